"""What a job may use besides the internet: secrets and endpoints of blocks, and commands on machines, by `on-host`.

Only a commit of the deployed branch is given any of it. No key of a machine enters the job's cell: toto runs ssh.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from blocks import JobAccess
from tasks.roll_out import connect
from toto.base import files
from toto.base.errors import InputError
from toto.cell.cell import python
from toto.cell.relay import Endpoint
from toto.git_host import admission
from toto.infra_repo import tree as tree_of
from toto.infra_repo.manifest import Machine
from toto.infra_repo.settings import Settings
from toto.jobs.folder import Job
from toto.jobs.run import Machines
from toto.machine import owners
from toto.rehearsal import on_host
from toto.rehearsal.phase_run import Endpoint as OfMachine

_ON_HOST: Final = """\
#!/bin/sh
if [ $# -lt 2 ] || [ ! -x "{place}/machines/$1/bin/on-host" ]; then
    echo "usage: on-host MACHINE [--stdin] COMMAND [ARGUMENT...]; the job's MACHINES are {names}" >&2
    exit 64
fi
machine=$1
shift
exec "{place}/machines/$machine/bin/on-host" "$@"
"""


@dataclass(frozen=True)
class Access:
    """What a run is given: the fields of `toto.jobs.run.Given`."""

    secrets: dict[str, str] = field(default_factory=dict)
    kubeconfig: str = ""
    endpoints: tuple[Endpoint, ...] = ()
    machines: Machines | None = None


async def access_of(repo: Path, tree: Path, commit: str, flow_run: str, job: Job) -> Access:
    """What a job of a commit, which is exported at `tree`, may use. Raises `InputError`, `NotOwned`."""
    if not (job.conf.access or job.conf.machines):
        return Access()
    if not await admission.on_deployed_branch(repo, commit):
        raise InputError(
            f"{commit[:8]} is not on the deployed branch, so that the job is given neither ACCESS nor MACHINES",
            target=job.name,
            hint="run it from a commit that is",
        )
    blocks = [await JobAccess.named(repo, name) for name in job.conf.access]
    kubeconfigs = [text for each in blocks if (text := each.kubeconfig.get_secret_value())]
    if len(kubeconfigs) > 1:
        raise InputError("several blocks of its ACCESS have a kubeconfig", target=job.name, hint="name one of them")
    settings, manifest = tree_of.read_tree(tree)
    machines = []
    for name in job.conf.machines:
        if (machine := manifest.machines.get(name)) is None or not machine.deployed:
            raise InputError(f"there is no machine {name} that toto deploys", target=job.name, hint="see MACHINES")
        owners.check(repo, machine)
        machines.append(machine)
    return Access(
        {name: value for each in blocks for name, value in each.environment().items()},
        "".join(kubeconfigs),
        tuple(endpoint for each in blocks for endpoint in each.reached()),
        partial(_serving, repo, flow_run, settings, machines) if machines else None,
    )


@asynccontextmanager
async def _serving(
    repo: Path, run: str, settings: Settings, machines: list[Machine], folder: Path, place: Path, user: int | None
) -> AsyncIterator[None]:
    """Serve `on-host MACHINE` from `folder`, which the job sees at `place`. Raises `Unreachable`."""
    interpreter, _ = python()
    (folder / "machines").mkdir(mode=0o755)
    names = " ".join(each.name for each in machines)
    files.write(folder / "bin" / "on-host", _ON_HOST.format(place=place, names=names), 0o755)
    async with AsyncExitStack() as stack:
        for machine in machines:
            own = folder / "machines" / machine.name
            own.mkdir(mode=0o755)
            endpoint = OfMachine.of(machine, await stack.enter_async_context(connect(machine, repo, run, settings)))
            await stack.enter_async_context(
                on_host.serving(
                    own, endpoint.connection, interpreter, user, endpoint.command, place / "machines" / machine.name
                )
            )
        yield
