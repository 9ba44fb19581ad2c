"""Reports wait on the disk, signed and in order, whatever happens to who writes them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flying_monkey import proof, signature
from flying_monkey.apart import Failed
from flying_monkey.outbox import MOST, Outbox
from flying_monkey.report import Report
from toto.machine import proof as machine_proof

NOW = 1_800_000_000


def report(**more: object) -> Report:
    made = {"repo": "infra", "machine": "web1", "serial": 7, "phase": "try", "step": "tried", "state": "done 0"}
    return Report(**made | {"system": "", "boots": "", "at": 1, "number": 0} | more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def key(new_key: Callable[[str], Path]) -> Path:
    return new_key("ssh_host_ed25519_key")


def test_they_are_sent_in_order_once_and_are_signed(tmp_path: Path, key: Path) -> None:
    outbox = Outbox(tmp_path / "reports", lambda: NOW)
    for step in ("prepared", "tried", "kept"):
        outbox.add(report(step=step), key)
    sent: list[bytes] = []
    assert outbox.send(sent.append) == 3 and outbox.send(sent.append) == 0
    host_key = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    read = []
    for envelope in sent:
        text, signed = signature.unsealed(envelope)
        machine_proof.check(text, signed, "web1", [host_key], proof.REPORT)
        with pytest.raises(signature.NotGenuine):
            machine_proof.check(text, signed, "web1", [host_key], proof.ASK)
        read.append(Report.read(text))
    assert [each.step for each in read] == ["prepared", "tried", "kept"]
    assert [each.number for each in read] == [NOW, NOW + 1, NOW + 2]


def test_what_toto_does_not_take_waits(tmp_path: Path, key: Path) -> None:
    outbox = Outbox(tmp_path, lambda: NOW)
    for _ in range(3):
        outbox.add(report(), key)
    taken: list[bytes] = []

    def away(envelope: bytes) -> None:
        if taken:
            raise Failed("away")
        taken.append(envelope)

    with pytest.raises(Failed):
        outbox.send(away)
    assert Outbox(tmp_path, lambda: NOW).waiting() == [NOW + 1, NOW + 2]


def test_a_number_never_falls(tmp_path: Path, key: Path) -> None:
    first = Outbox(tmp_path, lambda: NOW).add(report(), key).number
    assert Outbox(tmp_path, lambda: 5).add(report(), key).number == first + 1, "a clock that was set back"
    (tmp_path / "number").write_text("x")
    assert Outbox(tmp_path, lambda: 5).add(report(), key).number == first + 2
    assert Outbox(tmp_path / "lost", lambda: NOW + 60).add(report(), key).number > first + 2


def test_the_newest_are_kept(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature, "seal", lambda text, *_: text)  # (ssh-keygen a hundred times over)
    outbox = Outbox(tmp_path, lambda: NOW)
    for _ in range(MOST + 3):
        outbox.add(report(), key)
    assert outbox.waiting() == list(range(NOW + 3, NOW + 3 + MOST))


def test_who_is_killed_leaves_only_whole_reports(tmp_path: Path, key: Path) -> None:
    """A writer is killed again and again, at any instant; what waits can always be read, and numbers never fall."""
    code = f"""
from pathlib import Path
from tests.flying_monkey.test_outbox import report
from flying_monkey.outbox import Outbox
while True:
    Outbox(Path({str(tmp_path)!r})).add(report(log="x" * 5_000), Path({str(key)!r}))
"""
    newest = 0
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as writer:
            before = len(Outbox(tmp_path).waiting())
            end = time.monotonic() + 20
            while len(Outbox(tmp_path).waiting()) < before + 2 and time.monotonic() < end:
                time.sleep(0.005)
            os.kill(writer.pid, signal.SIGKILL)
        outbox = Outbox(tmp_path)
        assert outbox.waiting()[-1] > newest
        newest = outbox.waiting()[-1]
    sent: list[bytes] = []
    outbox.send(sent.append)
    numbers = [Report.read(signature.unsealed(each)[0]).number for each in sent]
    assert numbers == sorted(set(numbers)) and numbers[-1] == newest
