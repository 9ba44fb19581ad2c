"""Build: all hosts of a commit, with nothing rehearsed or touched, as a build farm does it."""

import asyncio
import os
from pathlib import Path

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks import names, report, together
from tasks.build import build_host, failed, forget_all_but
from tasks.detect import Evaluations
from tasks.limits import room_for_run
from toto.base import runs
from toto.fleet.builds import BUILT
from toto.infra_repo import git
from toto.plan import make
from toto.plan.changes import Desired


@flow(name="build", flow_run_name=names.of_build, persist_result=False)
async def build(repo: Path, commit: str | None = None, only: list[str] | None = None, keep: int = 20) -> State[None]:
    """Build the systems of a commit's hosts, and keep them from garbage collection: a roll-out finds them there.

    Args:
        repo: the bare infra repo on toto.
        commit: a commit, tag or branch; the tip of the deployed branch when left out.
        only: names or tags of hosts; all when left out.
        keep: for how many commits, the newest that were built, the systems are kept.
    """
    if only is not None and not any(map(str.strip, only)):
        return Completed(message="`only` names nothing: nothing is built")
    newest, run = git.resolve(repo, commit or "HEAD"), str(runtime.flow_run.id)
    side_by_side = asyncio.Semaphore(os.cpu_count() or 1)
    async with room_for_run(repo, run, runtime.flow_run.tags, _go_on_waiting), runs.claimed(repo, run):
        hosts = await make.hosts(repo, newest, run, only or (), shown=Evaluations(repo))

        async def one(host: Desired) -> dict[str, str]:
            async with side_by_side:
                return await build_host.with_options(task_run_name=f"build {host.target.label}")(
                    repo, newest, host, hosts.settings.nix.build_timeout
                )

        rows = [*await together(map(one, hosts.desired)), *map(failed, hosts.failed)]
    rows.sort(key=lambda row: row["target"])
    await report.show_builds(repo, newest, rows)
    forget_all_but(repo, keep)
    wrong = [row["target"] for row in rows if row["result"] != BUILT]
    said = f"{newest[:8]}: {len(rows) - len(wrong)} of {len(rows)} hosts built"
    return Failed(message=f"{said}; not {', '.join(wrong)}") if wrong else Completed(message=said)


async def _go_on_waiting() -> None:
    """Nothing comes in the place of a build that waits."""
