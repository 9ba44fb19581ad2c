"""Which infra repo may deploy which machine: the first that does so owns it, until it retires it or it is moved.

The owners are in `machines.json` in toto's state, by the machines' names, where no push reaches them. A machine is told
apart by its name, by its address and port, and by its host key: none of them may be that of a different repo's machine.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket as sockets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from toto.base import files, paths
from toto.base.errors import InputError, TotoError
from toto.git_host import shared
from toto.git_host.shared import name_of
from toto.infra_repo import git, manifest
from toto.infra_repo.fields import plain_address
from toto.infra_repo.manifest import Machine, Manifest, ManifestError
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.machine import documents
from toto.machine.ssh import SshTarget, Unreachable

FILE: Final = "machines.json"
LOOK_UP: Final = 5.0  # seconds
_FILE_IDENTITY: Final = re.compile(r"(\bidentity:\s*[\"']?)([~/][^\s\"',}]*)")


class NotOwned(TotoError):
    """The machine belongs to a different repository."""


class Owner(BaseModel):
    """The repo that owns a machine, since when (UTC), and what the machine is known by."""

    model_config = ConfigDict(frozen=True)

    repo: Path
    at: str
    address: str
    port: int
    ip: str = ""
    host_keys: tuple[str, ...] = ()


class Owners(BaseModel):
    """The owners of machines, by the machines' names. `adopted`: those of version 0.1.0's ledgers are among them."""

    model_config = ConfigDict(frozen=True)

    machines: dict[str, Owner] = {}
    adopted: bool = False


def file() -> Path:
    """The file with the owners of all machines; there may be none."""
    return paths.state_home() / FILE


def read() -> Owners:
    """The owners of all machines. Raises `TotoError` when the file cannot be read."""
    try:
        return Owners.model_validate_json(file().read_text())
    except FileNotFoundError:
        return Owners()
    except (OSError, ValueError, ValidationError) as error:
        raise TotoError(f"cannot be read: {error}", target=str(file()), hint="restore it from the backup") from None


async def check_distinct(fleet: Manifest) -> None:
    """Raise `ManifestError` when the addresses of two deployed machines lead to one port of one machine.

    (`manifest.check_distinct` compares their texts, and looks nothing up.)
    """
    deployed = [each for each in fleet.machines.values() if each.deployed]
    if all(_is_ip(each.address) for each in deployed):
        return
    places = await asyncio.gather(*(_places(each.address) for each in deployed))
    problems: list[str] = []
    known: dict[tuple[str, int], str] = {}
    for machine, found in zip(deployed, places, strict=True):
        others = {known.setdefault((place, machine.ssh.port), machine.name) for place in found} - {machine.name}
        if others:
            problems.append(
                f"{manifest.FILE}: {machine.name}: address: {machine.address}, port {machine.ssh.port}, leads to "
                f"{', '.join(sorted(others))}: one machine has one name"
            )
    if problems:
        raise ManifestError(problems)


async def moved(repo: Path, machine: Machine, owners: Owners) -> str:
    """The address at which a machine was deployed, when it has a new one now and its `was` says so; else "".

    Raises `InputError` when it does not say so: what was deployed would be left behind, or a second one would appear.
    """
    owner = owners.machines.get(machine.name)
    if owner is None or owner.repo != repo.resolve():
        return ""
    old, new = (plain_address(owner.address), owner.port), (plain_address(machine.address), machine.ssh.port)
    if old == new:
        return ""
    if owner.port == machine.ssh.port:
        there = await asyncio.gather(_places(owner.address), _places(machine.address))
        if (there[0] | {plain_address(owner.ip)}) & there[1]:
            return ""
    place = owner.address if owner.port == machine.ssh.port else f"{owner.address}:{owner.port}"
    if machine.was is not None and machine.was.lower() in (
        owner.address.lower(),
        f"{owner.address.lower()}:{owner.port}",
    ):
        return place
    raise InputError(
        f"is deployed at {place}, and {manifest.FILE} says {machine.address}, port {machine.ssh.port}",
        target=machine.name,
        hint=f"write `was: {place}` next to its address, to deploy it there; what runs at {place} stays as it is, if "
        "that is a different machine",
    )


async def _places(address: str) -> set[str]:
    """The IP addresses that an address leads to; none when that is not known within a few seconds."""
    if _is_ip(address):
        return {plain_address(address)}
    with contextlib.suppress(OSError, UnicodeError, TimeoutError):
        async with asyncio.timeout(LOOK_UP):
            found = await asyncio.get_running_loop().getaddrinfo(address, None, type=sockets.SOCK_STREAM)
        return {plain_address(str(each[4][0])) for each in found}
    return set()


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


def check(repo: Path, machine: Machine, host_keys: Sequence[str] = ()) -> None:
    """Raise `NotOwned` when the machine, or what it is known by, belongs to a different repo."""
    _check(read(), repo, machine, host_keys)


async def claim(repo: Path, machine: Machine, host_keys: Sequence[str], ip: str = "") -> None:
    """Make `repo` the owner of a machine that it is about to deploy, and that was found at `ip`. Raises `NotOwned`."""
    async with paths.alone(_lock()):
        owners = read()
        _check(owners, repo, machine, host_keys, ip)
        before = owners.machines.get(machine.name)
        owner = _owner(repo, machine, host_keys, before.at if before else git.now(), ip)
        if owner != before:
            _write(owners, {**owners.machines, machine.name: owner})


async def located(repo: Path, machine: Machine, patience: float) -> str:
    """The IP address of a machine: of several that its name has, the first that accepts a connection in `patience` s.

    It is looked up once, and used from then on: a name that leads elsewhere the next time would pass what is checked.
    Raises `NotOwned` when it is the machine that toto runs on, or a link-local address, where clouds keep their
    secrets: only the repo that also has the shared blocks may deploy those. Raises `Unreachable` for an unknown name.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            machine.address, machine.ssh.port, type=sockets.SOCK_STREAM
        )
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"{machine.address} has no address: {error}", target=machine.name) from None
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    if (wrong := [each for each in addresses if _is_close(each)]) and not shared.has_shared_blocks(repo):
        raise NotOwned(
            f"its address {wrong[0]} is one of the machine that toto runs on, or of its link alone: "
            f"{name_of(repo)} must not deploy it",
            target=machine.name,
            hint="the repository that `shared_blocks` in the server's server.toml names may deploy it",
        )
    for each in addresses if len(addresses) > 1 else []:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(patience):
                _, writer = await asyncio.open_connection(each, machine.ssh.port)
            writer.close()
            return each
    return addresses[0]


def _is_close(address: str) -> bool:
    """Whether an address is one of this machine's own (any that it can listen at), or link-local."""
    found = ipaddress.ip_address(address)
    real = (found.ipv4_mapped if found.version == 6 else None) or found
    if real.is_link_local or real.is_loopback or real.is_unspecified:
        return True
    with sockets.socket(sockets.AF_INET if real.version == 4 else sockets.AF_INET6) as probe:
        try:
            probe.bind((str(real), 0))
        except OSError:
            return False
    return True


async def release(repo: Path, name: str) -> None:
    """Give up a machine that left the repo's manifest; nothing happens when the repo does not own it."""
    async with paths.alone(_lock()):
        owners = read()
        if name in owners.machines and owners.machines[name].repo == repo.resolve():
            _write(owners, {each: owner for each, owner in owners.machines.items() if each != name})


async def move(name: str, old: Path, new: Path) -> None:
    """Make `new` the owner of a machine in place of `old`.

    Raises `InputError` when that is not its owner, or has left the machine half done: only `old` can revert it.
    """
    if old.is_dir() and Ledger(old).get(Target("host", name)).intent is not None:
        raise InputError(
            f"{name_of(old)} is deploying it, or has left it half done",
            target=name,
            hint="wait for the run, or start settle/settle for that repository",
        )
    async with paths.alone(_lock()):
        owners = read()
        owner = owners.machines.get(name)
        if owner is None or owner.repo != old.resolve():
            whose = f"it belongs to {name_of(owner.repo)}" if owner else "nobody has deployed it"
            raise InputError(f"does not belong to {name_of(old)}: {whose}", target=name, hint="see `toto machine list`")
        if not new.is_dir():
            raise InputError("there is no such repository", target=str(new))
        _write(owners, {**owners.machines, name: owner.model_copy(update={"repo": new.resolve(), "at": git.now()})})


async def adopt(repos: Iterable[Path]) -> list[str]:
    """Once, after an upgrade from version 0.1.0: the owners are the repos whose ledgers have the machines.

    Returns a line for each machine that several have; the one that deployed it last owns it.
    """
    if read().adopted:
        return []
    async with paths.alone(_lock()):
        owners, said = await _adopted(read(), repos)
        _write(owners.model_copy(update={"adopted": True}), owners.machines)
    return said


async def adoption(repos: Iterable[Path]) -> tuple[Owners, list[str]]:
    """The owners as they would be after `adopt`, and what it would say."""
    owners = read()
    return (owners, []) if owners.adopted else await _adopted(owners, repos)


async def _adopted(owners: Owners, repos: Iterable[Path]) -> tuple[Owners, list[str]]:
    found = sorted(
        [each for repo in repos async for each in _deployed(repo)], key=lambda each: each[2].at, reverse=True
    )
    said: list[str] = []
    for repo, machine, owner in found:
        try:
            _check(owners, repo, machine, owner.host_keys)
        except NotOwned as error:
            said.append(str(error))
        else:
            owners = owners.model_copy(update={"machines": {machine.name: owner, **owners.machines}})
    return owners, said


def relocate(state: Path, moved: Callable[[Path], Path]) -> None:
    """Give the owners in `state` the paths that their repositories have by now."""
    known = state / FILE
    if known.exists():
        owners = Owners.model_validate_json(known.read_text())
        machines = {
            name: owner.model_copy(update={"repo": moved(owner.repo)}) for name, owner in owners.machines.items()
        }
        files.write(known, f"{owners.model_copy(update={'machines': machines}).model_dump_json(indent=1)}\n")


def host_keys(target: SshTarget) -> list[str]:
    """The host keys by which toto knows a machine: the manifest's, or those that were seen at the first connection."""
    if target.host_key is not None:
        return [plain_key(target.host_key)]
    return list(_known(target.known_hosts, target.name)) if target.known_hosts else []


def _check(owners: Owners, repo: Path, machine: Machine, keys: Sequence[str], ip: str = "") -> None:
    place = {plain_address(each) for each in (machine.address, ip) if each}
    for name, owner in owners.machines.items():
        if owner.repo == repo.resolve():
            continue
        if name == machine.name:
            what = ""
        elif owner.port == machine.ssh.port and {plain_address(each) for each in (owner.address, owner.ip)} & place:
            what = f"its address {machine.address}, that of {name}, "
        elif set(owner.host_keys) & set(keys):
            what = f"its host key, that of {name}, "
        else:
            continue
        raise NotOwned(
            f"{what}belongs to the repository {name_of(owner.repo)} since {owner.at}: "
            f"{name_of(repo)} must not deploy it",
            target=machine.name,
            hint=f"if it is to move, on toto: toto machine move {name} {name_of(owner.repo)} {name_of(repo)}",
        )


async def identity_files(repo: Path) -> list[Path]:
    """The key files that `ssh.identity` of a repo's deployed machines named, as version 0.1.0 allowed it."""
    return list(dict.fromkeys([Path(file).expanduser() async for _, _, file in _known_by_ledger(repo) if file]))


async def _deployed(repo: Path) -> AsyncIterator[tuple[Path, Machine, Owner]]:
    """The machines that a repo's ledger has, as the manifest of their last commit knows them."""
    async for machine, at, _ in _known_by_ledger(repo):
        pinned = machine.ssh.host_key
        keys = [plain_key(pinned)] if pinned else list(_known(paths.repo_state(repo) / "known_hosts", machine.name))
        yield repo, machine, _owner(repo, machine, keys, at)


async def _known_by_ledger(repo: Path) -> AsyncIterator[tuple[Machine, str, str | None]]:
    """The machines that a repo's ledger has, since when, and the key file that the manifest named for it."""
    for target, entry in Ledger(repo).read().entries.items():
        last = entry.good or (entry.intent.desired if entry.intent else None)
        if target.kind != "host" or last is None:
            continue
        done = await git.git(repo, "show", f"{last.commit}:{manifest.FILE}", check=False)
        named: list[str] = []

        def without(found: re.Match[str], named: list[str] = named) -> str:
            named.append(found[2])
            return f"{found[1]}file-{len(named) - 1}"

        try:
            machine = manifest.parse(_FILE_IDENTITY.sub(without, done.stdout)).machines.get(target.name)
        except InputError:
            machine = None
        if machine is None:
            continue
        number = re.fullmatch(r"file-(\d+)", machine.ssh.identity or "")
        yield machine, last.at, named[int(number[1])] if number and int(number[1]) < len(named) else None


def _owner(repo: Path, machine: Machine, keys: Sequence[str], at: str, ip: str = "") -> Owner:
    return Owner(
        repo=repo.resolve(), at=at, address=machine.address, port=machine.ssh.port, ip=ip, host_keys=tuple(keys)
    )


def _known(known_hosts: Path, name: str) -> Iterator[str]:
    lines = known_hosts.read_text().splitlines() if known_hosts.exists() else []
    for line in lines:
        match line.split():
            case [names, kind, key, *_] if name in names.split(","):
                yield f"{kind} {key}"


def plain_key(key: str) -> str:
    """A public host key without its comment: type and base64."""
    return " ".join(key.split()[:2])


def _lock() -> Path:
    return paths.state_home() / f"{FILE}.lock"


def _write(owners: Owners, machines: dict[str, Owner]) -> None:
    now = owners.model_copy(update={"machines": machines})
    files.write(file(), f"{now.model_dump_json(indent=1)}\n")
    make_known(now)


def make_known(owners: Owners) -> None:
    """Tell the web server that machines ask which of them there are: those whose host key is known."""
    documents.make_known(
        {
            name: documents.Known(
                repo=name_of(each.repo), folder=paths.repo_folder(each.repo), host_keys=each.host_keys
            )
            for name, each in owners.machines.items()
            if each.host_keys
        }
    )
