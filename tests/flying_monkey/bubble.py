"""A machine in a bubble: the agent and `activate.sh` as they are, in namespaces of their own, without systemd.

bwrap makes it. Its /var/lib, /nix and /etc/flying-monkey are folders here that outlive a power cut; its nix is a few
lines of shell. A system is a folder whose switch-to-configuration becomes what runs. Every program of the machine's
tells of itself by `at NAME`, and waits for ever at the NAME that `stop_at` gave.
"""

import contextlib
import json
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import flying_monkey
from flying_monkey.desired import Deadlines, Desired, Machine, Phase, System
from flying_monkey.signature import NAMESPACE, seal
from tests.flying_monkey.conftest import HOST_KEY

_PACKAGE: Final = Path(flying_monkey.__file__).parent
_PATIENCE: Final = 60.0  # seconds
# Answers requests, and runs shell lines; what it starts is the machine's.
_INIT: Final = """
import json, subprocess, sys
sys.path.insert(0, "/agent")
from flying_monkey import helper
for line in sys.stdin:
    request = json.loads(line)
    if "sh" in request:
        done = subprocess.run(["/bin/sh", "-c", request["sh"]], capture_output=True, text=True)
        said = {"status": done.returncode, "out": done.stdout.strip(), "err": done.stderr.strip()}
    else:
        said = helper.answer(request)
    print(json.dumps(said), flush=True)
"""
# Accepts a document, and is killed before it begins the update.
ACCEPT: Final = """
from flying_monkey import helper, update
def killed(memory): os.kill(os.getpid(), 9)
update._begin = killed
helper.answer(json.load(open("/var/lib/request")))
"""
# Is the update, and is killed before it writes its memory for the nth time, or after that.
RUN: Final = """
from flying_monkey import machine, memory, update
count, save = 0, memory.Memory.save
def killed(self, file):
    global count
    count += 1
    if (count, WHEN) == (NTH, "before"): os.kill(os.getpid(), 9)
    save(self, file)
    if count == NTH: os.kill(os.getpid(), 9)
memory.Memory.save = killed
os.environ.update(machine.environment())
update.run(machine.Configuration.load())
"""
_PROGRAMS: Final = {
    "at": """
echo "$1" >> /var/lib/events
[ "$(cat /var/lib/stop 2>/dev/null)" != "$1" ] || {
  touch /var/lib/reached
  while [ -e /var/lib/reached ]; do sleep 0.05; done
}""",
    "nix-store": 'case $2 in --hash) at verify; cat "$3/hash" ;; *) shift 2; printf "%s\\n" "$@" ;; esac',
    "nix": ':; for path; do :; done; [ ! -e "$path/untrusted" ]',
    "nix-env": 'at profile; ln -sfn "$4" "$2.new"; mv -T "$2.new" "$2"; at profile-set',
    "sync": ":",
    "reboot": "at reboot",
    "sudo": 'while [ "$1" = -n ] || [ "$1" = -- ]; do shift; done; exec "$@"',
    "systemctl": '[ "$1" != list-units ] || cat /var/lib/broken 2>/dev/null; [ "$1" != is-active ]',
}


class Bubble:
    """A context manager: switched on from entry to exit."""

    def __init__(self, root: Path, signer: Path, *, memory_size: int = 0, **configuration: object) -> None:
        """`signer` is a private key; `memory_size` makes a disk of so many bytes for the agent's memory."""
        self.root, self.signer, self.serial, self._memory_size = root, signer, 0, memory_size
        self.var, self.run, self.etc = root / "var", root / "run", root / "etc"
        self._process: subprocess.Popen[str] | None = None
        for folder in ("var", "run", "nix/store", "nix/var/nix/profiles", "etc/ssh", "etc/flying-monkey"):
            (root / folder).mkdir(parents=True)
        self.etc.joinpath("passwd").write_text("root:x:0:0::/root:/bin/sh\n")
        self.etc.joinpath("ssh/ssh_host_ed25519_key.pub").write_text(f"{HOST_KEY}\n")
        public = " ".join(signer.with_suffix(".pub").read_text().split()[:2])
        agent = self.etc / "flying-monkey"
        agent.joinpath("signers").write_text(f'infra namespaces="{NAMESPACE}" {public}\n')
        settings = {"repo": "infra", "name": "web1", "signers": "/etc/flying-monkey/signers", **configuration}
        agent.joinpath("config.json").write_text(json.dumps(settings))
        self.good, self.new = self.system("good"), self.system("new")
        self.profile = root / "nix/var/nix/profiles/system"
        self.profile.symlink_to(self.good.path)

    _python = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"

    def agent(self, module: str) -> str:
        """The shell line that is a program of the agent's, with its arguments."""
        code = f'import sys; sys.path.insert(0, "/agent"); from flying_monkey.{module} import main; main()'
        return f"exec {self._python} -IS -c '{code}' \"$@\""

    # What it is made of

    def program(self, file: Path, body: str, mode: int = 0o755) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\nPATH=/run/wrappers/bin:/usr/bin:/bin\n{body}\n")
        file.chmod(mode)

    def hook(self, name: str, body: str = "") -> None:
        """A program such as `prepare.d/drain`, which tells of itself by its name and its reason."""
        self.program(self.etc / "flying-monkey" / name, f'at "{name.partition("/")[2]} $TOTO_REASON"\n{body}')

    def system(self, name: str, script: str = "", stored: System | None = None) -> System:
        """A system; with `stored` one that toto's store has too."""
        made = stored or System(f"/nix/store/{name[0] * 32}-nixos-system-{name}", f"sha256:{'0' * 51}{name[0]}")
        path, here = made.path, self.root / made.path[1:]
        switch = f"""
at "{name} $1"
{script}
[ "$1" = boot ] || {{ ln -sfn {path} /run/current-system.new; mv -T /run/current-system.new /run/current-system; }}
at "{name} $1 done" """
        self.program(here / "bin/switch-to-configuration", switch)
        (here / "hash").write_text(f"{made.nar_hash}\n")
        return made

    # Power

    def __enter__(self) -> Self:
        self.boot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.power_cut()

    def boot(self) -> None:
        """Switch it on: it runs what its profile says."""
        self.release()
        shutil.rmtree(self.run)
        self.run.mkdir()
        for name, body in _PROGRAMS.items():
            self.program(self.run / "wrappers/bin" / name, body)
        system = self.profile.readlink()
        for link in ("current-system", "booted-system"):
            (self.run / link).symlink_to(system)
        (self.root / "boot_id").write_text(f"{secrets.token_hex(8)}\n")
        here = {
            each: self.root / each[1:] for each in ("/run", "/nix", "/etc/ssh", "/etc/flying-monkey", "/etc/passwd")
        }
        here["/var/lib"] = self.var
        words = ["bwrap", "--unshare-user", "--uid", "0", "--gid", "0", "--unshare-pid", "--unshare-net"]
        words += ["--die-with-parent", "--clearenv", "--cap-drop", "ALL", "--tmpfs", "/tmp", "--tmpfs", "/root"]
        for path in map(Path, ("/usr", "/bin", "/lib", "/lib64")):
            if path.is_symlink():
                words += ["--symlink", str(path.readlink()), str(path)]
            elif path.exists():
                words += ["--ro-bind", str(path), str(path)]
        base = Path(sys.base_prefix)
        if not base.is_relative_to("/usr"):
            words += ["--ro-bind", str(base), str(base)]
        for place, mine in here.items():
            words += ["--bind", str(mine), place]
        if self._memory_size:
            words += ["--size", str(self._memory_size), "--tmpfs", "/var/lib/flying-monkey"]
        words += ["--ro-bind", str(_PACKAGE), "/agent/flying_monkey"]
        words += ["--proc", "/proc", "--dev", "/dev"]
        words += ["--ro-bind", str(self.root / "boot_id"), "/proc/sys/kernel/random/boot_id", "--chdir", "/", "--"]
        self._process = subprocess.Popen(
            [*words, self._python, "-IS", "-c", _INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def resume(self) -> None:
        """What a unit does at each boot."""
        self.python('sys.argv[1:] = ["resume"]; from flying_monkey.update import main; main()')

    def python(self, text: str) -> None:
        """Run a program of the agent's, which may be killed."""
        (self.var / "program").write_text(f'import json, os, sys\nsys.path.insert(0, "/agent")\n{text}')
        self.sh(f"{self._python} -IS /var/lib/program; test $? = 0 -o $? = 137")

    def power_cut(self) -> None:
        """Everything that runs is gone at once."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None

    # What is said to it

    def document(self, system: System | None = None, phase: Phase = "try", **more: Any) -> Desired:
        """A new document for this machine, about the new system unless `system` is given."""
        self.serial += 1
        now = datetime.now(UTC).replace(microsecond=0)
        made = Desired(
            repo="infra",
            machine=Machine("web1", HOST_KEY),
            serial=self.serial,
            issued=now,
            expires=now + timedelta(days=7),
            phase="try",
            activation="switch",
            system=system or self.new,
            good=self.good,
            deadlines=Deadlines(prepare=20, activate=20, confirm=20, finish=20),
        )
        return replace(made, phase=phase, **more)

    def say(self, document: Desired) -> dict[str, Any]:
        """The answer to a document."""
        verb = "confirm" if document.phase == "keep" else "arm"
        return self._ask(verb=verb, envelope=seal(document.write(), self.signer).decode())

    def accept(self, document: Desired) -> None:
        """Have it accepted by a helper that is killed then."""
        verb, envelope = "confirm" if document.phase == "keep" else "arm", seal(document.write(), self.signer)
        (self.var / "request").write_text(json.dumps({"verb": verb, "envelope": envelope.decode()}))
        self.python(ACCEPT)

    def status(self, wait: int = 0) -> dict[str, Any]:
        return self._ask(verb="status", wait=wait)

    def facts(self) -> dict[str, Any]:
        return self._ask(verb="facts")

    def log(self) -> str:
        return str(self._ask(verb="log")["log"])

    def ended(self) -> dict[str, Any]:
        """The status, once nothing is under way but the wait for a word."""
        end = time.monotonic() + _PATIENCE
        while (found := self.status(20))["state"] == "running":
            assert time.monotonic() < end, found
        return found

    def sh(self, line: str) -> str:
        """What a shell line prints, which must succeed."""
        done = self._ask(sh=line)
        assert done["status"] == 0, done
        return str(done["out"])

    def _ask(self, **request: object) -> dict[str, Any]:
        assert self._process and self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    # Mishaps

    def events(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.var / "events").read_text().splitlines()
        return []

    def stop_at(self, event: str) -> None:
        """Have the program of that name wait until `release`."""
        (self.var / "stop").write_text(f"{event}\n")

    def reached(self, event: str) -> None:
        """Wait until it does."""
        end = time.monotonic() + _PATIENCE
        while not (self.var / "reached").exists():
            assert time.monotonic() < end, (event, self.events())
            time.sleep(0.02)

    def release(self) -> None:
        for name in ("stop", "reached"):
            (self.var / name).unlink(missing_ok=True)

    def kill(self, words: str) -> None:
        """Kill every process of the machine's whose command line has these words."""
        self.sh(
            f"for each in /proc/[0-9]*; do tr '\\0' ' ' 2>/dev/null < $each/cmdline | grep -v 'for each' | "
            f"grep -qF -- '{words}' && kill -KILL ${{each#/proc/}} 2>/dev/null; done; true"
        )
