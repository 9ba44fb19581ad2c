"""Remote builders: the machines to which toto's nix daemon hands builds over ssh, as the server's settings name them.

nix (`nix __build-remote`, as root) finds them in a file `machines`, and logs in by the `ssh` that lies beside it, which
knows these machines, each by its pinned host key, and no others. That `ssh` leaves the daemon's network, which leads to
the internet only; builds, which are in that network, have neither the key nor a way out.

A builder that does not answer is passed over: nix asks the next one, and then builds on this machine, if it can. Of one
that is lost while it builds nix says only that the build failed; `Heard` tells the two apart.
"""

import asyncio
import logging
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from toto.base import files, made_once, paths, process, server_rules
from toto.base.errors import InputError, TotoError
from toto.base.server_rules import Builder
from toto.cell import folders
from toto.infra_repo.manifest import Machine, Manifest
from toto.nix.quiet import ASKED, Slots

log = logging.getLogger(__name__)

HERE: Final = "toto"  # who builds what no builder does, in words
KEY: Final = "builders"  # of toto's keys; on the builders it is as good as root's
PUBLIC: Final = "builders.pub"  # its public half, beside the daemon's socket
_TOLD: Final = "fleet.json"  # in what toto writes for the daemon: what manifests say of builders
_MOST_TOLD: Final = 1_000_000  # bytes of it
_LISTED: Final = "builders.json"  # in the daemon's home: all of them, for a toto that is not root
_BUILDERS: Final = TypeAdapter(dict[str, Builder])
_PAUSE: Final = 2.0  # seconds until a change of the settings counts
_DRV: Final = r"'(/nix/store/[a-z0-9]{32}-([^']+)[.]drv)'"
_BEGINS: Final = re.compile(rf"building {_DRV}(?: on 'ssh://([^']+)')?")
_AWAY: Final = re.compile(r"cannot build on 'ssh://([^']+)': (?:error: )?(.*)")
_REFUSED: Final = re.compile(rf"error: build of {_DRV} on 'ssh://")  # the builder itself says that it failed
_FAILED: Final = re.compile(rf"error: (?:builder for|Cannot build) {_DRV}")
_NOBODY: Final = re.compile(
    r"^error: a '([^']+)' with features \{(.*)\} is required to build '[^']+', but I am a '([^']+)'", re.MULTILINE
)


class Heard:
    """Hears what nix says of a build, and passes it on: who builds what, and which builders failed, in plain words."""

    def __init__(self, on_line: process.LineSink | None = None) -> None:
        self._on_line = on_line or (lambda _line: None)
        self._where: dict[str, str] = {}  # drv → builder
        self._last: dict[str, str] = {}  # drv → who built it in the end
        self.lost = False  # one of them went away with a build
        self.failed: dict[str, str] = {}
        """builders that did not do what they were asked to, and why"""

    def __call__(self, line: str) -> None:
        """Hear a line."""
        if begins := _BEGINS.match(line):
            drv, name, builder = begins.groups()
            self._last[drv] = builder or HERE
            if builder:
                self._where[drv] = builder
                line = f"building {name} on {builder}"
        elif away := _AWAY.match(line):
            builder, why = away.groups()
            if "@@@@" in why:  # the first line of what ssh says then
                why = "its host key is not the one of the settings"
            self.failed.setdefault(builder, f"does not answer ({why})")
            line = f"the builder {builder} is passed over: {why}"
        elif refused := _REFUSED.match(line):
            self._where.pop(refused[1], None)
        elif (failed := _FAILED.match(line)) and (builder := self._where.pop(failed[1], "")):
            line = self._lost(builder, failed[2])
        self._on_line(line)

    def ended(self, said: str) -> None:
        """Hear that nix failed, and all that it `said`: where that is no error, it has lost what it handed out last."""
        if not self.lost and self._where and re.search("^error", said, re.MULTILINE) is None:
            drv, builder = self._where.popitem()
            self._on_line(self._lost(builder, drv.removesuffix(".drv")[len("/nix/store/") + 33 :]))

    def _lost(self, builder: str, what: str) -> str:
        self.lost, self.failed[builder] = True, f"was lost while it built {what}"
        return f"the builder {builder} was lost while it built {what}"

    @property
    def who(self) -> str:
        """Who built how many derivations, and which builders failed, in words; "" when nothing was to be built."""
        counted = Counter(self._last.values())
        built = ", ".join(f"{builder} {count}" for builder, count in sorted(counted.items()))
        failed = [f"{builder} {why}" for builder, why in self.failed.items()]
        return "; ".join([*([f"built by {built}"] if built else []), *failed])

    def nobody(self, said: str) -> str | None:
        """What to say when nix `said` that nobody here builds for a system; None when it did not."""
        if (found := _NOBODY.search(said)) is None:
            return None
        what = f"{found[1]} (with {found[2]})" if found[2] else found[1]
        failed = "; ".join(f"{builder} {why}" for builder, why in self.failed.items())
        return f"nobody builds for {what}: this machine is {found[3]}, and " + (failed or "no builder offers it")


async def key() -> Path:
    """The private key by which the daemon logs in to builders; it is made when missing, in the daemon's own state."""
    return await made_once.ssh_key(paths.state_home() / "keys" / KEY, "toto builders")


async def public_half() -> str:
    """Its public half, as one line. Raises `CommandFailed`."""
    done = await process.run(["ssh-keygen", "-y", "-P", "", "-f", await key()], timeout=60)
    return f"{' '.join(done.stdout.split()[:2])} toto\n"


def unused() -> list[str]:
    """A line when the settings of a toto that is not root name builders: root's daemon has settings of its own."""
    rules = server_rules.load()
    if os.geteuid() == 0 or not (rules.builders or rules.fleet_builders):
        return []
    return [
        f"{paths.state_home() / server_rules.FILE} names builders, which are not used: the nix daemon is root's\n"
        f"next: write them to {server_rules.FILE} in the TOTO_STATE of `toto nix-daemon` (/var/lib/toto-nix), and let "
        f"the key in there that `toto key {KEY}` prints"
    ]


def settings(folder: Path) -> str:
    """The lines of nix.conf that name the builders in `folder`."""
    return f"builders = @{folder}/machines\nbuilders-use-substitutes = true\n"


def obeying(home: Path, fleet: Manifest) -> dict[str, str]:
    """The machines that obey signed documents and are builders of the daemon in `home`, by their names: as which one.

    That they build nothing for others is what keeps strangers out of their stores.
    """
    return {
        name: builder
        for name, machine in fleet.machines.items()
        if machine.by_document
        for builder in same_as(home, machine)
    }


def same_as(home: Path, machine: Machine) -> list[str]:
    """Those of the builders of the daemon in `home` that are this machine, by its address or its host key."""
    return [
        name
        for name, each in listed(home).items()
        if each.address == machine.address or _key(each.host_key) == _key(machine.ssh.host_key or "")
    ]


def unused_of(home: Path, fleet: Manifest) -> list[str]:
    """The machines that are builders by their manifest, and not by the settings of the daemon in `home`."""
    known = {_key(each.host_key) for each in listed(home).values()}
    return [
        name
        for name, machine in fleet.machines.items()
        if machine.role == "builder" and _key(machine.ssh.host_key or "") not in known
    ]


def listed(home: Path) -> dict[str, Builder]:
    """The builders of the daemon in `home`, by their names."""
    try:
        return _BUILDERS.validate_json((home / _LISTED).read_bytes())
    except FileNotFoundError:
        return {}


def _key(host_key: str) -> str:
    """A host key without its comment."""
    return " ".join(host_key.split()[:2])


def tell(home: Path, described: Mapping[str, Builder]) -> None:
    """Tell the daemon in `home` what manifests say of builders, by `REPO/MACHINE`. Raises OSError."""
    said, file = _BUILDERS.dump_json(dict(described)), home / ASKED / _TOLD
    if not (file.exists() and file.read_bytes() == said):
        files.write_bytes(file, said)


def wanted(home: Path) -> dict[str, Builder]:
    """The builders by the server's settings, and those of the fleet that they approve, as the manifests describe them.

    One of the fleet is called `REPO.MACHINE`. Raises `InputError` for mistakes in the settings.
    """
    rules = server_rules.load()
    found = dict(rules.builders)
    try:
        told = _BUILDERS.validate_json(folders.read_regular(home, ASKED, _TOLD, most=_MOST_TOLD) or b"{}")
    except ValidationError:
        told = {}
    for machine, approved in rules.fleet_builders.items():
        each = told.get(machine)
        if each is not None and _key(each.host_key) == _key(approved.host_key):
            found.setdefault(machine.replace("/", ".").lower(), each.model_copy(update={"user": approved.user}))
    return found


async def follow(folder: Path, known: Mapping[str, Builder], slots: Slots) -> None:
    """Write to `folder` whenever others are wanted than are `known`, and take the slots that toto asks for.

    Mistakes in the server's settings are logged.
    """
    wrong = ""
    while True:
        await asyncio.sleep(_PAUSE)
        try:
            slots.look(known)
            found = wanted(folder.parent)
        except (TotoError, OSError) as error:
            if str(error) != wrong:
                log.error("the builders stay as they are: %s", error)
            wrong = str(error)
            continue
        if found != known:
            await write(folder, found)
            log.info("builders: %s", ", ".join(found) or "none")
        known, wrong = found, ""


async def write(folder: Path, builders: Mapping[str, Builder]) -> None:
    """Write what nix and ssh need to know of the builders to `folder`, which only root can enter.

    Its `ssh` works for as long as this process lives. Raises `InputError` when there is no ssh.
    """
    ssh = shutil.which("ssh")
    if ssh is None and builders:
        raise InputError(
            "ssh is not on PATH, by which builders are reached", hint="on Debian: apt install openssh-client"
        )
    paths.private_folder(folder)
    (folder / "key").unlink(missing_ok=True)
    (folder / "key").symlink_to(await key())
    of_toto = f"/proc/{os.getpid()}/ns"
    leaving = ["nsenter", f"--mount={of_toto}/mnt", f"--net={of_toto}/net", "--", "env", f"--chdir={folder}"]
    files.write(
        folder / "ssh", f'#!/bin/sh\nexec {shlex.join([*leaving, ssh or "ssh", "-F", "ssh_config"])} "$@"\n', 0o700
    )
    files.write(folder / "known_hosts", "".join(f"{name} {_key(each.host_key)}\n" for name, each in builders.items()))
    files.write_bytes(folder.parent / _LISTED, _BUILDERS.dump_json(dict(builders)), 0o644)
    files.write(folder / "ssh_config", "".join(_of_ssh(name, each) for name, each in builders.items()) + _COMMON)
    files.write(folder / "machines", "".join(_of_nix(name, each) for name, each in builders.items()))


# Paths are relative: nix and ssh_config take no blanks, or each in a way of its own.
_COMMON: Final = """\
Host *
  IdentityFile key
  IdentitiesOnly yes
  IdentityAgent none
  BatchMode yes
  StrictHostKeyChecking yes
  UserKnownHostsFile known_hosts
  GlobalKnownHostsFile /dev/null
  UpdateHostKeys no
  ConnectTimeout 5
  ServerAliveInterval 15
  ServerAliveCountMax 3
  LogLevel ERROR
"""


def _of_ssh(name: str, builder: Builder) -> str:
    place = f"HostName {builder.address}\nPort {builder.port}\nUser {builder.user}"
    return f"Host {name}\n{place}\nHostKeyAlias {name}\n"


def _of_nix(name: str, builder: Builder) -> str:
    systems, features = ",".join(builder.systems), ",".join(builder.features) or "-"
    return f"ssh://{name} {systems} - {builder.jobs} {builder.speed} {features} - -\n"
