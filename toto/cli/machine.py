"""Which repository may deploy which machine, and what a machine is told to let toto in."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from flying_monkey.signature import fingerprint
from toto.api import certificate
from toto.base.errors import InputError
from toto.base.moment import moment
from toto.cli.common import Repos, on_toto
from toto.cli.output import AsJson, emit, show
from toto.cli.verbs import Verbs
from toto.git_host import access, shared
from toto.git_host import host as git_host
from toto.machine import keys, owners, signing_key
from toto.plan.changes import table

verbs = Verbs()
machine = verbs.group("machine")


@machine.verb("list")
def listing(as_json: AsJson = False) -> int:
    """Show every machine that was deployed, and its repository."""
    rows = [
        {"machine": name, "repository": shared.name_of(each.repo), "address": each.address, "since": each.at}
        for name, each in sorted(owners.read().machines.items())
    ]
    text = table(rows, ("machine", "repository", "address", "since")) if rows else "no machine was deployed yet"
    emit("machines", rows, text, as_json=as_json)
    return 0


@machine.verb("move")
async def move(
    name: Annotated[str, Argument(metavar="MACHINE")],
    old: Annotated[str, Argument(metavar="FROM", help="the repository that it belongs to")],
    new: Annotated[str, Argument(metavar="TO", help="the repository that it will belong to")],
    repos: Repos,
) -> int:
    """Let a different repository deploy a machine."""
    before, after = (access.path_of(repos, access.check_name(each)) for each in (old, new))
    await owners.move(name, before, after)
    print(f"{name} belongs to {new}, whose key it must let in:")
    print(await keys.public_half(await keys.of_machines(after)))
    return 0


@machine.verb("setup")
async def setup(
    name: Annotated[str, Argument(metavar="REPO")],
    repos: Repos,
    pull: Annotated[
        str | None, Option(metavar="URL", help="for a machine that asks at this address, such as https://toto:4201")
    ] = None,
) -> int:
    """Print what the configuration of a machine says to be deployed by documents."""
    repo = on_toto(repos, name)
    closures = await keys.public_half(await keys.for_closures(repo, None))
    lines = ["enable = true;", f"repo = {_nix(name)};", f"signers = [ {' '.join(map(_nix, await _signers()))} ];"]
    if pull is None:
        what = "toto hands them over as the user `toto`, who can do little else, and copies closures that are signed"
        login = await keys.public_half(await keys.of_machines(repo), f"toto {name}")
        lines += [f"loginKeys = [ {_nix(login)} ];", "writableStore = true;"]
    else:
        what = "it asks for them, and nobody logs in for toto"
        lines += [f"url = {_nix(pull)};"]
        if (authority := certificate.authority()).exists():
            lines += [f"ca = pkgs.writeText \"toto-ca.pem\" ''\n{authority.read_text()}    '';"]
    print(
        "\n".join(
            [
                f"# A machine that does what signed documents of toto's say: {what}.",
                f"# From `toto machine setup {name}`. Import nixosModules.flying-monkey of toto besides.",
                "{ pkgs, ... }:",
                "{",
                "  services.flying-monkey = {",
                *(f"    {line}" for line in lines),
                "  };",
                f"  nix.settings.trusted-public-keys = [ {_nix(closures)} ];",
                "}",
            ]
        )
    )
    return 0


async def _signers() -> list[str]:
    """The public keys that machines should list: the one that signs, and the next one when there is one."""
    files = [await signing_key.current(), *filter(None, [signing_key.of_next()])]
    return [owners.plain_key(await keys.public_half(each)) for each in files]


@machine.verb("signer")
async def signer(
    repos: Repos,
    make_next: Annotated[bool, Option("--next", help="first make the next key, when it is missing")] = False,
    vouched: Annotated[
        Path | None,
        Option("--certificate", metavar="FILE", help="first take over what a machine's other signer vouches by"),
    ] = None,
    use: Annotated[bool, Option("--use", help="sign by the next key from now on, if all machines list it")] = False,
    force: Annotated[bool, Option("--force", help="also if some would then obey nothing")] = False,
) -> int:
    """Show the key that machines obey, and who lists it; change to a next one."""
    infra = git_host.infra_repos(repos)
    if make_next:
        await signing_key.make_next()
    if vouched is not None:
        await signing_key.take_certificate(vouched, infra)
    if use:
        return await _use_signer(infra, force=force)
    current, *following = await _signers()
    print(f"signs: {current}")
    file = signing_key.certificate(await signing_key.current())
    if file.exists():
        print(f"       vouched for until {moment(signing_key.valid_until(file))}, where a machine does not list it")
    for each in following:
        print(f"next:  {each}")
    names = {fingerprint(each): word for each, word in ((current, "signs"), *((each, "next") for each in following))}
    machines = await signing_key.listed(infra)
    rows = [
        {"machine": name, "repository": repo, "lists": _lists(signers, names)}
        for (repo, name), signers in sorted(machines.items())
    ]
    show(table(rows, ("machine", "repository", "lists")) if rows else "no machine does what documents say yet")
    newest = (following or [current])[-1]
    if following:
        print("next: list both in services.flying-monkey.signers of every machine, and push; then:")
        print("    toto machine signer --use")
    if any(fingerprint(newest) not in (signers or ()) for signers in machines.values()):
        names_of = ",".join(map(shared.name_of, infra))
        print("if the old one is lost: have an offline key that the machines list vouch for it, and take that over:")
        print(f"    echo {shlex.quote(newest)} > toto.pub")
        print(f"    ssh-keygen -s OFFLINE-KEY -I toto -n {names_of} -V -1d:+30d toto.pub")
        print(f"    toto machine signer --certificate toto-cert.pub{' --use' if following else ''}")
    return 0


def _lists(signers: tuple[str, ...] | None, names: Mapping[str, str]) -> str:
    """Which of toto's keys a machine lists, by their `names`, and how many others."""
    if signers is None:
        return "not known: nothing was heard of it"
    known = [names[each] for each in signers if each in names]
    others = len(signers) - len(known)
    return ", ".join([*known, *([f"{others} other{'s' if others > 1 else ''}"] if others else [])]) or "nothing"


async def _use_signer(repos: list[Path], *, force: bool) -> int:
    if (following := signing_key.of_next()) is None:
        raise InputError("there is no next key", hint="toto machine signer --next")
    if not force:
        await signing_key.require_all(following, repos)
    before, *_ = await _signers()
    old = await signing_key.use_next()
    print(f"signs from now on: {(await _signers())[0]}")
    print(f"next: take the old one out of services.flying-monkey.signers everywhere, and push, then remove {old}:")
    print(f"    {before}")
    print("where it was stolen: put it into services.flying-monkey.revokedKeys as well")
    return 0


def _nix(text: str) -> str:
    """A string of the nix language."""
    return json.dumps(text).replace("${", "\\${")
