"""Whether toto could log in to a machine after an activation: tried before it.

The machine serves one login as the new configuration would: with its sshd, its settings, its keys and its sudoers,
over the connection that is there (`login` of `activate.sh`; nothing of the machine changes). What is refused is tried
once more with the configuration that runs. Only when that one lets toto in is it the new one's fault: an address that
a rule names, for instance, is not seen in either.
"""

import ipaddress
import json
import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from toto.base import process
from toto.base.errors import TotoError
from toto.cell.cell import STORE

if TYPE_CHECKING:
    from toto.machine.activation import SudoActivator

_SECONDS: Final = 120.0  # for a login on a slow machine
_MOST: Final = 10_000_000  # bytes of an activation script, or of what it says of the users
_USERS: Final = re.compile(r"/nix/store/[a-z0-9]{32}-users-groups\.json")
_DECLARED: Final = "/var/lib/nixos/declarative-users"
_ANY: Final = ("", "*", "0.0.0.0", "::")  # noqa: S104  (read, not bound)
_WORDS: Final = 5  # lines that sshd and ssh said


class WouldLockOut(TotoError):
    """The new configuration would not let toto in, so it is not activated."""


async def check(activator: "SudoActivator", closure: str, running: str, *, address: bool = False) -> None:
    """Check that `closure`, which is on the machine, lets toto in as `running`, its present system, does.

    That is: the user stays, sshd listens where toto connects, lets the key in, and sudo asks for no password. With
    `address`, also that the address of the manifest is one that the closure configures.
    Raises `WouldLockOut`, `Unreachable`.
    """
    target = activator.connection.target
    await _check_user(activator, closure)
    if address:
        await _check_address(activator, closure)
    serving, listening = await _serving(activator), await _listening(activator, closure)
    if (
        serving
        and listening
        and not _is_among(serving, listening)
        and _is_among(serving, await _listening(activator, running))
    ):
        raise WouldLockOut(
            f"its new sshd would listen on {', '.join(listening)}, and toto is connected to {':'.join(serving)}",
            target=target.name,
            hint="let it listen on both and deploy, then change machines.yaml and deploy, and then remove the old one",
        )
    if (refused := await _login(activator, closure)) is None:
        return
    if (control := await _login(activator, running)) is None:
        raise WouldLockOut(
            f"its new configuration does not let toto in:\n{refused}",
            target=target.name,
            hint=f"let {target.user} log in with toto's key, and become root without a password",
        )
    logging.getLogger(__name__).warning(
        "%s: whether its new configuration lets toto in could not be tried: %s", target.name, control.splitlines()[-1]
    )


async def _login(activator: "SudoActivator", system: str) -> str | None:
    """Log in, and become root, as `system` lets toto; None when that worked, else what sshd, ssh and sudo said."""
    connection = activator.connection
    target = connection.target
    through = shlex.join(map(str, connection.command(shlex.join(activator.words("login", system)))))
    options = {
        "ProxyCommand": through.replace("%", "%%"),
        "ControlMaster": "no",
        "ControlPath": "none",
        # (The connection underneath has checked the host key.)
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "GlobalKnownHostsFile": "/dev/null",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    become = ["true"] if target.user == "root" else ["sudo", "-n", "true"]
    try:
        done = await process.run(
            ["ssh", *words, "-F", connection.config, "-T", target.name, "--", *become],
            check=False,
            timeout=_SECONDS,
            target=target.name,
        )
    except process.CommandTimeout:
        return f"the login did not end within {_SECONDS:.0f} s"
    return None if done.status == 0 else process.tail(done.stderr, _WORDS) or f"ssh exited with status {done.status}"


async def _check_user(activator: "SudoActivator", closure: str) -> None:
    """NixOS removes a user whom it once made and who is not in the configuration any more."""
    target = activator.connection.target
    found = _users(closure)
    if found is None or target.user in found[0]:
        return
    mutable = found[1]
    declared = (await activator.connection.run(["cat", _DECLARED], check=False, timeout=_SECONDS)).stdout.split()
    if not mutable or target.user in declared:
        raise WouldLockOut(
            f"its new configuration has no user {target.user}, as whom toto logs in",
            target=target.name,
            hint=f"add users.users.{target.user} again, or set ssh.user in machines.yaml first",
        )


def _users(closure: str) -> tuple[set[str], bool] | None:
    """The names of the users of a configuration, and whether it leaves others alone; None where it does not say."""
    try:
        script = _read(Path(closure) / "activate")
        file = _USERS.search(script)
        said = json.loads(_read(Path(file[0]))) if file else None
        return None if said is None else ({each["name"] for each in said["users"]}, bool(said["mutableUsers"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _read(path: Path) -> str:
    """A file of the store. Raises OSError, and ValueError for a link that leads out of it."""
    path = path.resolve(strict=True)
    if not path.is_relative_to(STORE):
        raise ValueError(path)
    with path.open("rb") as file:
        return file.read(_MOST).decode(errors="replace")


async def _check_address(activator: "SudoActivator", closure: str) -> None:
    target = activator.connection.target
    wanted = target.ip or target.address
    found = await _lines(activator, "addresses", closure)
    if wanted not in {_plain(each) for each in found}:
        raise WouldLockOut(
            f"its new configuration has the addresses {', '.join(found) or '(none)'}, and not {wanted}",
            target=target.name,
            hint="correct the address in machines.yaml, or set [roll_out] check_address = false",
        )


def _plain(address: str) -> str:
    try:
        return str(ipaddress.ip_interface(address).ip)
    except ValueError:
        return address


async def _listening(activator: "SudoActivator", system: str) -> list[str]:
    """Where a configuration's sshd listens, as `ADDRESS:PORT` or `PORT`; nothing when that cannot be seen."""
    return await _lines(activator, "listening", system)


async def _serving(activator: "SudoActivator") -> tuple[str, str] | None:
    """The address and port of the machine that serve toto; a router in between may show toto different ones."""
    done = await activator.connection.run(["sh", "-c", 'echo "$SSH_CONNECTION"'], check=False, timeout=_SECONDS)
    match done.stdout.split():
        case [_, _, address, port]:
            return address, port
    return None


def _is_among(serving: tuple[str, str], listening: Sequence[str]) -> bool:
    """Whether a connection to an address and a port is to one of those on which sshd listens."""
    for each in listening:
        address, _, port = each.rpartition(":")
        address = address.strip("[]").partition("%")[0]
        if port == serving[1] and address in {*_ANY, serving[0]}:
            return True
    return False


async def _lines(activator: "SudoActivator", *words: str) -> list[str]:
    """The lines that a verb prints; none when it does not end."""
    try:
        done = await activator.connection.run(activator.words(*words), check=False, timeout=_SECONDS)
    except process.CommandTimeout:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
