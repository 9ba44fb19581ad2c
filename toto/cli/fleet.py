"""What is deployed, and its history."""

from pathlib import Path
from typing import Annotated

from typer import Option

from toto.cli.common import Repo, infra, moment, show
from toto.cli.verbs import Verbs
from toto.fleet.state import described
from toto.infra_repo import git
from toto.ledger.ledger import REF, Ledger
from toto.ledger.target import HOST
from toto.machine import condition, signing_key
from toto.plan.changes import table

verbs = Verbs()


@verbs.verb("status")
def status(repo: Repo = None) -> int:
    """Show what the ledger says about every target."""
    rows, path = [], infra(repo)
    for target, entry in sorted(Ledger(path).read().entries.items()):
        state, why, since, _ = described(entry)
        said = f"{state}: {why}" if why else state
        last = entry.good or entry.rehearsed
        rows.append(
            {
                "target": str(target),
                "commit": last.commit[:8] if last else "",
                "since": since,
                "state": "\n".join([said, *(_heard_of(path, target.name) if target.kind == HOST else ())]),
            }
        )
    show(table(rows, ("target", "commit", "since", "state")) if rows else "nothing was deployed from here yet")
    return 0


def _heard_of(repo: Path, machine: str) -> list[str]:
    """What is known of a machine that does what documents say, without asking it."""
    known = condition.read(repo, machine)
    if not (at := condition.heard(repo, machine, known)):
        return []
    said = f"last contact {moment(at)}"
    if known is None:
        return [said]
    lines = [f"{said}, reboot needed" if known.reboot_needed else said, *(f"drifted: {each}" for each in known.drift)]
    if until := signing_key.vouched_until(repo, machine):
        lines.append(f"obeys toto by a certificate, until {moment(until)}: list the key of `toto machine signer`")
    return lines


@verbs.verb("log")
async def log(repo: Repo = None, lines: Annotated[int, Option("-n", metavar="N", help="how many lines")] = 30) -> int:
    """Show the deployment history, newest first."""
    done = await git.git(infra(repo), "log", f"--max-count={lines}", "--format=%cI  %s", REF, check=False)
    show(done.stdout.rstrip() if done.status == 0 else "nothing was deployed from here yet")
    return 0
