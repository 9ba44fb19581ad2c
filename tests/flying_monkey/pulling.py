"""A real agent in a process of its own, on a machine that is a folder: `Pulling`.

Only what would change this machine is a stand-in (`StandIn`), and says so: it obeys genuine documents as the helper
does, with the helper's own checks and memory, but an activation is a word in a file. What it does with a system is
named in `behaviour.json`: by the end of the system's name, the state in which its activation ends. A file `free` says
how many bytes are free in the store.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from flying_monkey import agent, machine, signature
from flying_monkey.desired import BadDocument, Desired
from flying_monkey.fetch import Fetcher
from flying_monkey.machine import Configuration
from flying_monkey.memory import Memory, Refused

WAIT: Final = (4.0, 5.0)  # seconds of a long poll


@dataclass
class StandIn:
    """A stand-in for `flying_monkey.helper`: it remembers documents, and activates nothing."""

    folder: Path
    configuration: Configuration

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        match request:
            case {"verb": "status"}:
                return self._status()
            case {"verb": "log"}:
                return {"log": "the stand-in's log"}
            case {"verb": "arm" | "confirm", "envelope": str(envelope)}:
                try:
                    return self._obey(envelope.encode())
                except (Refused, signature.NotGenuine, BadDocument) as error:
                    return {"error": str(error), "kind": type(error).__name__}
        return {"error": "no such verb", "kind": "BadRequest"}

    def _obey(self, envelope: bytes) -> dict[str, Any]:
        file = Path(self.configuration.memory)
        memory, now = Memory.load(file), Memory.load(file).now(time.time(), 0)
        text = signature.opened(envelope, self.configuration.repo, Path(self.configuration.signers), now)
        document = Desired.read(text)
        memory = memory.accept(
            document, self.configuration.repo, self.configuration.name, self.configuration.public_keys(), now
        )
        is_ = self._is()
        path = document.system.path
        if document.phase == "keep" and is_["system"] != path:
            return {"error": f"this machine runs {is_['system']}, and not {path}", "kind": "NotReady"}
        ends = self._behaviour().get(path.rpartition("-")[2], "done 0")
        if ends == "refused":
            return {"error": "the disk is full", "kind": "NotReady"}
        step = {"try": "tried", "keep": "finished", "back": "finished"}[document.phase]
        replace(memory, step="tried" if document.phase == "try" else "finished").save(file)
        done = {**is_, "before": is_["system"], "step": step, "state": ends, "phase": document.phase}
        done |= {"system": path if not ends.startswith("back") else is_["system"]}
        done["boots"] = is_["boots"] if document.phase == "try" else path
        done["until"] = time.time() + document.deadlines.confirm if document.phase == "try" else 0
        self._write(done)
        with (self.folder / "activations").open("a") as log:
            log.write(f"{document.phase} {path}\n")
        return {"serial": document.serial, "step": step}

    def _status(self) -> dict[str, Any]:
        is_ = self._is()
        if is_["until"] and time.time() > is_["until"]:  # nobody kept it
            is_ |= {"system": is_["before"], "step": "finished", "state": "back 0", "until": 0}
            self._write(is_)
        serial = Memory.load(Path(self.configuration.memory)).serial
        shown = ("phase", "step", "state", "system", "boots")
        return {"serial": serial, **{key: is_[key] for key in shown}, "drift": is_.get("drift", "")}

    def _is(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "is.json").read_text())
        return found

    def _write(self, found: dict[str, Any]) -> None:
        fresh = self.folder / "is.new"
        fresh.write_text(json.dumps(found))
        fresh.replace(self.folder / "is.json")

    def _behaviour(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.folder / "behaviour.json").read_text())
        return found


def main(place: str, wait: tuple[float, float]) -> None:
    """Run an agent for the machine that is the folder `place`, until SIGTERM."""
    folder = Path(place)
    configuration = Configuration(**json.loads((folder / "config.json").read_text()))
    own = machine.environment() | {"NIX_CONF_DIR": str(folder)}
    machine.environment = lambda: own  # (this machine's nix trusts other keys)
    disk = machine.free
    machine.free = lambda: int((folder / "free").read_text()) if (folder / "free").exists() else disk()
    made = agent.at(configuration)
    made.fetcher = Fetcher(made.toto.server, store=f"local?root={folder / 'root'}")
    made.helper, made.wait, made.first_pause, made.again = StandIn(folder, configuration), wait, 0.2, 0.2
    print("the helper is a stand-in", flush=True)
    while True:
        made.turn()


@dataclass
class Pulling:
    """The machine `name`, with its host key in `keys`, that asks at `url` and takes closures signed by `trusted`."""

    folder: Path
    name: str
    keys: Path
    url: str
    ca: Path
    signer: Path
    trusted: str
    system: str = "/nix/store/00000000000000000000000000000000-installed"

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        public = " ".join(self.signer.with_suffix(".pub").read_text().split()[:2])
        (self.folder / "signers").write_text(f'infra namespaces="{signature.NAMESPACE}" {public}\n')
        (self.folder / "nix.conf").write_text(f"trusted-public-keys = {self.trusted}\nbuild-users-group =\n")
        self.configure()
        self.behave()
        is_ = {
            "system": self.system,
            "boots": self.system,
            "step": "finished",
            "state": "none",
            "phase": "",
            "until": 0,
        }
        (self.folder / "is.json").write_text(json.dumps(is_))

    def configure(self, **more: Any) -> None:
        made = Configuration(
            repo="infra",
            name=self.name,
            signers=str(self.folder / "signers"),
            memory=str(self.folder / "memory" / "memory.json"),
            host_keys=str(self.keys),
            url=self.url,
            ca=str(self.ca),
            metrics=str(self.folder / "metrics.prom"),
        )
        (self.folder / "memory").mkdir(exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(asdict(made) | more))

    def behave(self, **ends: str) -> None:
        """How activations end, by the last word of the system's name; "done 0" for the others."""
        (self.folder / "behaviour.json").write_text(json.dumps(ends))

    @contextlib.asynccontextmanager
    async def running(self, wait: tuple[float, float] = WAIT) -> AsyncIterator["subprocess.Popen[bytes]"]:
        """Run the agent to the end of the block; kill it then, as a power cut would."""
        place = str(self.folder)
        code = f"from tests.flying_monkey.pulling import main; main({place!r}, {wait})"
        with (self.folder / "log").open("ab") as log:
            agent_ = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, start_new_session=True)
        try:
            yield agent_
        finally:
            for end in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    end(agent_.pid, signal.SIGKILL)
            agent_.wait()

    def activations(self) -> list[str]:
        file = self.folder / "activations"
        return file.read_text().splitlines() if file.exists() else []

    def log(self) -> str:
        return (self.folder / "log").read_text()
