"""A small fleet in files, as toto and its machines leave them: manifest, ledger, what a machine was told and said."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flying_monkey import proof, signature
from flying_monkey.desired import Desired, Machine, System
from tests.flying_monkey.test_outbox import report
from tests.ledger.test_ledger import WEB1, deployed, intent, note
from tests.repos import InfraRepo
from toto.compliance import history
from toto.compliance.results import Control, Outcome
from toto.infra_repo import manifest
from toto.ledger import steps
from toto.ledger.ledger import Entry, Ledger, owner
from toto.ledger.target import Target
from toto.machine import documents, owners
from toto.machine.fetched import Counting
from toto.nix.memory import Remembered

WEB2, NAS, DNS = Target("host", "web2"), Target("host", "nas"), Target("terraform", "dns")
MACHINES = """
machines:
  - {name: web1, address: 127.0.0.1, deploy: pull, tags: [nginx, web], ssh: {host_key: "KEY"}}
  - {name: web2, address: "fd00::2", tags: [postgresql]}
  - {name: nas, address: nas.example.org, role: other}
"""


@dataclass
class SmallFleet:
    """It is in the folder `repos`. web1 is good and pulls, web2 is half done, the NAS does not answer, a root is good.

    toto's state must be a test's own.
    """

    repos: Path
    key: Path

    def __post_init__(self) -> None:
        self.repo = InfraRepo(self.repos)
        self.bare = self.repo.bare
        self.host_key = " ".join(self.key.with_suffix(".pub").read_text().split()[:2])

    async def make(self) -> None:
        """Make it."""
        text = MACHINES.replace("KEY", self.host_key)
        self.repo.commit({"machines.yaml": text})
        book = Ledger(self.bare)
        for target in (WEB1, DNS):
            await book.write(target, steps.intend(intent("run-1")), "begun")
            await book.write(target, steps.good(deployed("/nix/store/new"), "run-1"), "good")
        left = intent("run-2").model_copy(update={"owner": f"{owner().rpartition('/')[0]}/1.0"})
        await book.write(WEB2, steps.intend(left), "begun")
        await book.write(NAS, lambda _: Entry(unreachable=note()), "unreachable")
        Remembered.in_repo(self.bare).file.write_text('{"web1": 300, "web1#vm": 400}')
        await owners.claim(self.bare, manifest.parse(text).machines["web1"], [self.host_key])
        failed = Control(check="inspec/base", id="ssh", outcome=Outcome.FAILED, impact=0.9)
        passed = Control(check="inspec/base", id="motd", outcome=Outcome.PASSED)
        await history.record(self.bare, "web2", [failed, passed], "c" * 40, "run-1")
        self.tell(datetime.now(UTC) + timedelta(days=7))
        self.fetches(hits=5, misses=1, sent=1_000)
        self.says(1, reboot_needed=True, drift="", failed_units=["a.service"])

    def tell(self, expires: datetime) -> None:
        """Give web1 a document."""
        now = datetime.now(UTC).replace(microsecond=0)
        path = f"/nix/store/{'0' * 32}-system"
        machine, system = Machine("web1", self.host_key), System(path, f"sha256-{'A' * 43}=")
        told = Desired("infra", machine, 7, now, expires.replace(microsecond=0), "try", "switch", system)
        documents.publish(self.bare, "web1", signature.seal(told.write(), self.key))

    def fetches(self, **counts: int) -> None:
        """Have web1 ask toto's cache for something."""
        counting = Counting()
        counting.note(documents.Place.of(self.bare, "web1"), **counts)
        counting.write()

    def says(self, number: int, key: Path | None = None, **details: object) -> None:
        """Have web1 report."""
        place = documents.Place.of(self.bare, "web1")
        made = report(number=number, at=int(time.time()), details=details)
        documents.note_contact(place)
        documents.take(place, "infra", "web1", signature.seal(made.write(), key or self.key, proof.REPORT))
