"""The steps of the tests' fourth kind. A file that holds `bad` fails its rehearsal, one with `late` its roll-out.

One with `ask` waits for an approval, one with `stuck` cannot be put back, and one that `freezes b` does so."""

import tempfile
from pathlib import Path
from typing import Literal

from prefect import flow

from flows.kinds import Steps
from tasks.accept import ACCEPTED, Asked, Present
from tasks.record import intend, record_good, record_reverted
from tasks.reversal import Reversal
from tests.toy.kind import DeployedFile, FileBefore, FileOrder
from toto.base.errors import TotoError
from toto.infra_repo import git
from toto.ledger import steps
from toto.ledger.ledger import Deployed, Frozen, Ledger
from toto.ledger.target import Target
from toto.plan.verdict import Question, Verdict

PATIENCE = 600.0  # seconds for an approval


@flow(name="rehearse file", flow_run_name="{order.name}", persist_result=False, validate_parameters=False)
async def rehearse(order: FileOrder) -> Verdict[int]:
    """Read it."""
    text = (order.tree / order.path).read_text()
    if "bad" in text:
        raise TotoError("it is bad", target=order.label)
    question = Question(f"it will hold {text!r}", PATIENCE) if "ask" in text else None
    return Verdict.passed(order, len(text), summary=f"{len(text)} bytes", difference=f"+{text}", question=question)


@flow(name="roll out file", flow_run_name="{order.name}", persist_result=False, validate_parameters=False)
async def roll_out(order: FileOrder, verdict: Verdict[int]) -> Literal["deployed"]:
    """Copy it."""
    verdict.check(order)
    to = _folder(order.tree) / order.name
    intended = await intend(order, FileBefore(text=to.read_text() if to.exists() else None))
    to.write_text((order.tree / order.path).read_text())
    if "late" in to.read_text():
        raise TotoError("it came too late", target=order.label)
    _, freezes, other = to.read_text().partition("freezes ")
    if freezes:
        frozen = steps.freeze(Frozen(by=order.name, why="so it says"))
        await Ledger(order.repo).write(Target(order.target.kind, other), frozen, f"{other}: frozen")
    await record_good(order, size=verdict.found, wait_for=[intended])
    return "deployed"


async def revert(reversal: Reversal) -> str:
    """Write what was there before."""
    entry = Ledger(reversal.repo).read().get(reversal.target)
    intent = steps.require_intent(entry, reversal.run)
    before = FileBefore.of(intent.before)
    to = (await _folder_at(reversal.repo, intent.desired.commit)) / reversal.target.name
    if "stuck" in to.read_text():
        raise TotoError("it is stuck", target=reversal.target.label)
    if before.text is None:
        to.unlink()
    else:
        to.write_text(before.text)
    await record_reverted(reversal.repo, reversal.target, entry.good, intent.desired, reversal.run, reversal.why)
    return "gone" if before.text is None else before.text


async def find_drift(repo: Path, run: str, target: Target, good: Deployed) -> list[str]:
    """Whether its size is what was recorded."""
    size = ((await _folder_at(repo, good.commit)) / target.name).stat().st_size
    return [] if size == DeployedFile.of(good).size else [f"it has {size} bytes"]


def _folder(tree: Path) -> Path:
    return Path((tree / "files/TO").read_text().strip())


async def _folder_at(repo: Path, commit: str) -> Path:
    with tempfile.TemporaryDirectory() as directory:
        await git.checkout(repo, commit, Path(directory, "tree"))
        return _folder(Path(directory, "tree"))


async def present(asked: Asked) -> Present:
    """What it holds."""
    file = (await _folder_at(asked.repo, asked.last.commit)) / asked.target.name
    if not file.exists():
        raise TotoError("it is away", target=asked.target.label)
    held = file.read_text()
    about = {"commit": asked.last.commit, "run": asked.run, "at": git.now()}
    return Present(DeployedFile(identity=ACCEPTED + held, size=len(held), **about), f"it holds {held!r}")


STEPS = Steps("files", rehearse, roll_out, revert, find_drift, present)
