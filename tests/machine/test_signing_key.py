"""The change of toto's signing key, with real keys, certificates and signatures of ssh-keygen."""

import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flying_monkey import signature
from flying_monkey.signature import NAMESPACE, NotGenuine, fingerprint, opened
from tests.ledger.test_ledger import deployed
from tests.metrics.test_fleet import Read
from tests.repos import InfraRepo
from tests.test_cli import said
from toto.ledger.ledger import Entry, Ledger
from toto.ledger.target import HOST, Target
from toto.machine import condition, signing_key
from toto.machine.condition import Condition
from toto.metrics import fleet as metrics
from toto.server.deployments import ROOT

MANIFEST = """machines:
  - { name: web1, address: 192.0.2.1, access: locked }
  - { name: web2, address: 192.0.2.2, access: locked }
  - { name: db1, address: 192.0.2.3 }
"""
NOW = datetime.now(UTC)
_END = "signer_certificate_expiry_timestamp_seconds"


def public(key: Path) -> str:
    return " ".join(key.with_suffix(".pub").read_text().split()[:2])


class Fleet:
    """toto with web1 and web2, which obey documents, and list keys as nix/flying-monkey.nix has it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repo = folder, folder / "state/server/repos/infra.git"
        self.offline = folder / "offline"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.offline], check=True)

    def list(self, machine: str, *keys: str, told: bool = True) -> None:
        file = self.folder / machine
        options = [f'{each}namespaces="{NAMESPACE}"' for each in ("", "cert-authority,")]
        file.write_text("".join(f"infra {each} {key}\n" for key in keys for each in options))
        if told:
            condition.note(self.repo, machine, Condition.of({"signers": signature.listed(file)}))

    def obeys(self, machine: str) -> bool:
        envelope = signing_key.sealed(b"do this\n", self.repo, machine)
        try:
            return opened(envelope, "infra", self.folder / machine, NOW) == b"do this\n"
        except NotGenuine:
            return False

    def signer(self, *words: str) -> tuple[int, str]:
        return said(self.folder, "machine", "signer", *words)

    def vouch(self, text: str, *more: str) -> Path:
        """Do as an administrator what `toto machine signer` says about an offline key."""
        lines = [line.strip() for line in text.splitlines()]
        (key,) = [line for line in lines if line.startswith("echo ")]
        (sign,) = [line for line in lines if line.startswith("ssh-keygen ")]
        script = f"{key}\n{sign.replace('OFFLINE-KEY', str(self.offline))} {' '.join(more)}"
        subprocess.run(["sh", "-ec", script], cwd=self.folder, check=True, capture_output=True)
        return self.folder / "toto-cert.pub"


@pytest.fixture
async def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    made = Fleet(tmp_path)
    repo = InfraRepo(tmp_path / "repo")
    repo.commit({"machines.yaml": MANIFEST})
    made.repo.parent.mkdir(parents=True)
    repo.bare.rename(made.repo)
    for machine in ("web1", "web2"):
        made.list(machine, public(await signing_key.current()))
    return made


async def test_a_key_is_used_once_all_machines_list_it(fleet: Fleet) -> None:
    first = public(await signing_key.current())
    assert fleet.signer("--use") == (2, "toto: there is no next key\nnext: toto machine signer --next\n")
    status, text = fleet.signer("--next")
    second = public(await signing_key.make_next())
    assert status == 0 and f"signs: {first}\nnext:  {second}\n" in text and "db1" not in text
    assert f'signers = [ "{first}" "{second}" ];' in said(fleet.folder, "machine", "setup", "infra")[1]
    module = (ROOT / "nix/flying-monkey.nix").read_text()
    (pattern,) = re.findall(r'key = types.strMatching "(.*)";', module)
    assert re.fullmatch(pattern, first), "what it prints is what the module takes"
    fleet.list("web1", first, second)
    status, text = fleet.signer("--use")
    assert status == 2 and "would obey nothing that the next key signs: web2 of infra\n" in text
    condition.note(fleet.repo, "web2", Condition(at=1))
    assert "web2 of infra (not known)" in fleet.signer("--use")[1]
    fleet.list("web2", first, second, public(fleet.offline))
    rows = [line.split() for line in fleet.signer()[1].splitlines()]
    assert ["web1", "infra", "signs,", "next"] in rows and ["web2", "infra", "signs,", "next,", "1", "other"] in rows
    assert fleet.obeys("web1") and public(await signing_key.current()) == first
    status, text = fleet.signer("--use")
    assert status == 0 and f"    {first}\n" in text
    assert public(await signing_key.current()) == second and signing_key.of_next() is None
    for machine in ("web1", "web2"):
        fleet.list(machine, second)
        assert fleet.obeys(machine)


async def test_after_a_loss_an_offline_key_vouches_for_a_new_one(fleet: Fleet) -> None:
    lost, offline = public(await signing_key.current()), public(fleet.offline)
    for machine in ("web1", "web2"):
        fleet.list(machine, lost, offline)
    for each in ("key", "key.pub"):
        (fleet.folder / "state/signer" / each).unlink()
    text = fleet.signer()[1]
    fresh = public(await signing_key.current())
    assert fresh != lost and not fleet.obeys("web1") and f"signs: {fresh}\n" in text
    assert fleet.signer("--certificate", str(fleet.vouch(text)))[0] == 0
    assert fleet.obeys("web1") and fleet.obeys("web2")
    until = signing_key.vouched_until(fleet.repo, "web1")
    assert until is not None and 29.9 < (until - NOW.timestamp()) / 86_400 < 30.1
    end = datetime.fromtimestamp(until, UTC).isoformat(timespec="seconds")
    assert f"vouched for until {end}" in fleet.signer()[1]
    await Ledger(fleet.repo).write(Target(HOST, "web1"), lambda _: Entry(good=deployed("/nix/store/x")), "web1: good")
    status = said(fleet.folder, "status", "--repo", str(fleet.repo))[1]
    assert f"obeys toto by a certificate, until {end}" in status
    assert Read(metrics.Fleet(fleet.repo.parent, "")).one(_END, machine="web1") == until
    fleet.list("web1", fresh)
    assert signing_key.vouched_until(fleet.repo, "web1") is None
    assert Read(metrics.Fleet(fleet.repo.parent, "")).one(_END) is None
    assert fleet.obeys("web1") and fleet.obeys("web2"), "each by what it lists"


async def test_a_stolen_key_is_replaced_though_no_machine_lists_the_next_one(fleet: Fleet) -> None:
    stolen, offline = public(await signing_key.current()), public(fleet.offline)
    text = fleet.signer("--next")[1]
    certificate = str(fleet.vouch(text))
    fleet.list("web1", stolen, offline)
    status, said_ = fleet.signer("--certificate", certificate, "--use")
    assert status == 2 and "next key signs: web2 of infra\n" in said_, "web2 does not list the offline key"
    assert fleet.signer("--use", "--force")[0] == 0
    assert fleet.obeys("web1") and not fleet.obeys("web2")


async def test_a_certificate_that_would_not_do_is_refused(fleet: Fleet) -> None:
    text = fleet.signer("--next")[1]
    others = fleet.vouch(text.replace("-n infra", "-n other"))
    assert "is not for infra\nnext: sign it with -n and all of them" in fleet.signer("--certificate", str(others))[1]
    strange = fleet.vouch(text.replace(public(await signing_key.make_next()), public(fleet.offline)))
    assert "is not for toto's key SHA256:" in fleet.signer("--certificate", str(strange))[1]
    assert "is no certificate of an ssh key" in fleet.signer("--certificate", str(fleet.offline))[1]


async def test_an_expired_certificate_does_not_count(fleet: Fleet) -> None:
    fleet.list("web1", public(fleet.offline))
    (fleet.folder / "state/signer/key").unlink()
    expired = fleet.vouch(fleet.signer()[1].replace("-V -1d:+30d", "-V 20200101:20200201"))
    assert fleet.signer("--certificate", str(expired))[0] == 0
    assert not fleet.obeys("web1")


def test_fingerprints_are_ssh_keygens_and_bounded(fleet: Fleet) -> None:
    shown = subprocess.run(["ssh-keygen", "-l", "-f", fleet.offline], capture_output=True, text=True, check=True).stdout
    assert fingerprint(public(fleet.offline)) == shown.split()[1]
    many = [f"ssh-ed25519 {'A' * 40}{number:04d}" for number in range(100)]
    fleet.list("web1", *many)
    known = condition.read(fleet.repo, "web1")
    assert known is not None and known.signers is not None and len(known.signers) == 16
    hostile = {"signers": ["\x1b[2J", 1, None, ["SHA256:"], f"SHA256:{'A' * 43}", "SHA256:x"] + ["y"] * 10**5}
    assert Condition.of(hostile).signers == (f"SHA256:{'A' * 43}",)
