"""The signer: the one process that reads the key by which machines are told what to be.

It signs no text that it is given. It is asked for a phase of a machine's deployment and writes the document itself,
from what the ledger says: what an open intent deploys may be tried, and kept once its roll-out has come so far; a
machine may go back to its last good at any time, and during a roll-out to what it ran before toto. So nobody who gets
hold of the web server, or of what runs in a cell, makes a machine run anything else.

    python -m toto.machine.signer      serve, on a socket in toto's state that only this user may open

A request is a line of JSON (`Request`), and so is the answer: `{"envelope": …}`, or `{"error": …}`.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from flying_monkey.desired import Activation, BadDocument, Deadlines, Desired, Hooks, Phase, System
from flying_monkey.desired import Machine as DocumentMachine
from flying_monkey.signature import CannotSign
from toto.base import files, paths, process
from toto.base.errors import TotoError
from toto.git_host.shared import name_of
from toto.infra_repo.manifest import Reboot
from toto.ledger.ledger import Before, Deployed, Entry, Ledger
from toto.ledger.target import HOST, Target
from toto.machine import owners, serials, signing_key
from toto.nix import commands as nix

log = logging.getLogger(__name__)

VALID: Final = timedelta(days=7)  # of a document
# The step of a roll-out at which a system may be tried, and the one at which it may be kept, by what a roll-out ends
# with: smoke tests come before a switch, and all of them before the end of one that only ever tests.
TRY: Final[Mapping[Activation, str]] = {"switch": "test", "test": "test", "boot": "boot"}
KEEP: Final[Mapping[Activation, str]] = {"switch": "switch", "test": "keep", "boot": "boot"}
_AHEAD: Final = (
    10 * 366 * 86_400
)  # seconds that a machine's serial may be ahead of the clock: more is a machine that lies
_LONGEST: Final = 65_536  # bytes of a request
_HOOKS: Final = 64  # that a document names of a kind
_PATIENCE: Final = 60.0  # seconds for an answer


class NotSigned(TotoError):
    """The ledger does not say what the document should."""


class Request(BaseModel):
    """What is asked for. `reported` is the newest serial that the machine has had, by its own account."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    repo: str
    machine: str
    phase: Phase
    activation: Activation
    reported: int = 0
    activate: int = 900
    """seconds that an activation may take"""
    confirm: int = 120
    """seconds until a machine goes back by itself"""
    prepare: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()
    """the names of the machine's own hooks that are to run"""
    reboot: bool = False
    """whether a machine that is to keep a system with a different kernel reboots into it"""
    reboot_until: datetime | None = None
    """before when that begins, if it does"""
    path: str = ""
    """what to go back to, when it is not simply the last good: one of what the ledger has for the machine"""
    resting: bool = False
    """whether it is only to be signed while no run works on the machine"""

    @classmethod
    def of(
        cls,
        repo: Path,
        machine: str,
        phase: Phase,
        activation: Activation,
        *,
        reported: int,
        finish: float,
        confirm: float,
        has_hooks: object,
        reboot: Reboot | None = None,
        path: str = "",
    ) -> Self:
        """A request, with the hooks that a machine says it has; what it says of them otherwise counts as none."""

        def named(when: str) -> tuple[str, ...]:
            found = has_hooks.get(when) if isinstance(has_hooks, Mapping) else None
            return tuple(filter(_is_hook, found))[:_HOOKS] if isinstance(found, list) else ()

        return cls(
            repo=str(repo),
            machine=machine,
            phase=phase,
            activation=activation,
            reported=reported,
            activate=max(1, round(finish)),
            confirm=max(1, round(confirm)),
            prepare=named("prepare"),
            finish=named("finish"),
            reboot=reboot is not None,
            reboot_until=reboot.until if reboot is not None else None,
            path=path,
        )


class _Path(Deployed):
    path: str


class _Systems(Before):
    system: str = ""
    profile: str = ""
    nar_hash: str | None = None
    profile_hash: str | None = None


async def document(asked: Request, now: datetime) -> Desired:
    """The document for a request, by the ledger, at the time `now`. Raises `NotSigned`, `NotOwned`, `TotoError`."""
    repo, target = Path(asked.repo), Target(HOST, asked.machine)
    owner = owners.read().machines.get(asked.machine)
    if owner is None or owner.repo != repo.resolve():
        raise owners.NotOwned(f"is not a machine of {name_of(repo)}", target=asked.machine)
    if not owner.host_keys:
        raise NotSigned("its host key is not known", target=asked.machine, hint="set ssh.host_key in machines.yaml")
    entry = Ledger(repo).get(target)
    try:
        return Desired(
            repo=name_of(repo),
            machine=DocumentMachine(asked.machine, owner.host_keys[0]),
            serial=_serial(repo, asked, now),
            issued=now,
            expires=now + VALID,
            phase=asked.phase,
            activation=asked.activation,
            system=await _system(_wanted(entry, asked), entry, asked.machine),
            deadlines=Deadlines(activate=asked.activate, confirm=asked.confirm),
            hooks=Hooks(prepare=asked.prepare, finish=asked.finish),
            good=await _known(_good(entry), entry),
            reboot="now" if asked.reboot and asked.phase == "keep" else "never",
            resting=asked.resting,
            reboot_until=asked.reboot_until if asked.reboot and asked.phase == "keep" else None,
        )
    except BadDocument as error:
        raise NotSigned(str(error), target=asked.machine) from None


def _wanted(entry: Entry, asked: Request) -> str:
    """The store path that a document of this phase is about. Raises `NotSigned`."""
    intent = entry.intent
    if intent is not None and asked.resting:
        raise NotSigned(f"run {intent.run} works on it", target=asked.machine)
    if intent is None and asked.phase == "back" and entry.good is not None:
        return _good(entry)
    if intent is None:
        raise NotSigned("no run is deploying it", target=asked.machine)
    if asked.phase == "back":
        before = _Systems.of(intent.before)
        if asked.path not in ("", _good(entry), before.system, before.profile):
            raise NotSigned(f"it has never been {asked.path}, by the ledger", target=asked.machine)
        return asked.path or _good(entry)
    if intent.step != (wanted := (TRY if asked.phase == "try" else KEEP)[asked.activation]):
        raise NotSigned(f"its roll-out is at `{intent.step}`, not at `{wanted}`", target=asked.machine)
    return _Path.of(intent.desired).path


def _good(entry: Entry) -> str:
    """What a machine goes back to: its last good, or what it ran before toto; "" when neither is known."""
    if entry.good is not None:
        return _Path.of(entry.good).path
    return "" if entry.intent is None else _Systems.of(entry.intent.before).system


async def _system(path: str, entry: Entry, machine: str) -> System:
    if (found := await _known(path, entry)) is None:
        raise NotSigned(f"{path or 'what it ran before'} is not in toto's store", target=machine)
    return found


async def _known(path: str, entry: Entry) -> System | None:
    """A system with its hash: by toto's store, or else, for what ran before toto, by the machine's own account."""
    if not path:
        return None
    with contextlib.suppress(process.CommandFailed):
        return System(path, await nix.nar_hash(path))
    before = _Systems() if entry.intent is None else _Systems.of(entry.intent.before)
    told = {before.profile: before.profile_hash, before.system: before.nar_hash}
    return System(path, found) if (found := told.get(path)) else None


def _is_hook(name: object) -> bool:
    """Whether a document may name it: a machine's other files in those folders are left out."""
    try:
        Hooks(prepare=(name,))  # type: ignore[arg-type]
    except BadDocument:
        return False
    return True


def _serial(repo: Path, asked: Request, now: datetime) -> int:
    """The next serial of a machine: above all before, also when toto was restored from a backup."""
    clock = int(now.timestamp())
    if asked.reported > clock + _AHEAD:
        raise NotSigned(
            f"it says that it has had the serial {asked.reported}, which toto never gave",
            target=asked.machine,
            hint="look at /var/lib/flying-monkey on the machine",
        )
    file = serials.file(repo)
    with files.lock(file.with_suffix(".lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            given = serials.read(repo)
        except ValueError:  # the clock is above all that was given
            log.warning("%s cannot be read, and is begun anew", file)
            given = {}
        serial = max(given.get(asked.machine, 0), clock, asked.reported) + 1
        files.write(file, json.dumps({**given, asked.machine: serial}))
    return serial


def socket() -> Path:
    """The socket at which the signer answers."""
    return paths.state_home() / "signer" / "socket"


@contextlib.contextmanager
def _short(place: Path) -> Iterator[str]:
    """A name of a socket that the kernel takes: the path of one may have 107 bytes."""
    folder = os.open(place.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{place.name}"
    finally:
        os.close(folder)


async def ask(asked: Request) -> bytes:
    """A signed document. Raises `NotSigned` when the signer refuses, or does not answer."""
    try:
        async with asyncio.timeout(_PATIENCE):
            with _short(socket()) as place:
                reader, writer = await asyncio.open_unix_connection(place, limit=_LONGEST * 8)
            with contextlib.closing(writer):
                writer.write(asked.model_dump_json().encode() + b"\n")
                answer = json.loads(await reader.readline())
    except (OSError, ValueError, TimeoutError) as error:
        raise NotSigned(
            f"the signer does not answer: {error or 'no answer'}", target=asked.machine, hint="does `toto serve` run?"
        ) from None
    if "error" in answer:
        raise NotSigned(answer["error"], target=asked.machine, hint=answer.get("hint"))
    return str(answer["envelope"]).encode()


async def answers() -> bool:
    """Whether the signer is there."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            with _short(socket()) as place:
                _, writer = await asyncio.open_unix_connection(place)
            writer.close()
            return True
    return False


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[None]:
    """Answer requests to the end of the block."""
    await signing_key.current()
    place = socket()
    place.unlink(missing_ok=True)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            said: dict[str, str | None]
            try:
                async with asyncio.timeout(_PATIENCE):
                    asked = Request.model_validate_json(await reader.readline())
                    made = await document(asked, datetime.now(UTC).replace(microsecond=0))
                    envelope = await asyncio.to_thread(
                        signing_key.sealed, made.write(), Path(asked.repo), asked.machine
                    )
                said = {"envelope": envelope.decode()}
                log.info("signed %s for %s, serial %d: %s", made.phase, asked.machine, made.serial, made.system.path)
            except TotoError as error:
                said = {"error": error.message, "hint": error.hint}
            except (CannotSign, ValidationError, ValueError, TimeoutError, OSError) as error:
                said = {"error": f"{type(error).__name__}: {error}"}
            writer.write(json.dumps(said).encode() + b"\n")
            await writer.drain()

    with _short(place) as name:
        server = await asyncio.start_unix_server(answer, name, limit=_LONGEST)
    place.chmod(0o600)
    try:
        yield
    finally:
        server.close()
        place.unlink(missing_ok=True)


async def _serve() -> None:
    async with serving():
        await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve())
