"""Look whether a target is still what its roll-out made of it."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.helm import reach, release_at
from tasks.terraform import session_at
from toto.ledger.ledger import Deployed
from toto.ledger.target import Target


@task(name="drift", task_run_name="drift", cache_policy=NO_CACHE)
async def look_at(repo: Path, run: str, target: Target, good: Deployed) -> list[str]:
    """What has changed since, a line a change; nothing where nothing has. Nothing is touched.

    Raises `TerraformFailed`, `ClusterUnreachable`.
    """
    if target.kind == "terraform":
        planned = await (await session_at(repo, run, target, good.commit)).plan()
        return [] if planned.empty else [planned.summary, *planned.lines]
    helm, release = await reach(repo, run), await release_at(repo, run, target, good.commit)
    outside = await helm.outside_change(release, good.revision)
    difference = await helm.drift(release)
    return [*([outside] if outside else []), *([] if difference.empty else difference.lines())]
