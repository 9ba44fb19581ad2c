"""A host tried by hand: its sandbox, and its tests alone; and what toto thinks of a TAP document."""

import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Final

from typer import Argument, Option

from toto.base import process, runs
from toto.base.errors import InputError
from toto.base.process import LineSink
from toto.cli import progress
from toto.cli.common import Repo, infra
from toto.cli.output import AsJson, emit, say
from toto.cli.verbs import Verbs
from toto.infra_repo import git, working
from toto.infra_repo.settings import Settings
from toto.infra_repo.tree import read_tree
from toto.ledger.target import HOST, Target
from toto.machine import access, keys, owners
from toto.nix.builders import Heard
from toto.plan import host as hosts
from toto.plan import make
from toto.plan.changes import table
from toto.plan.host import HostOrder
from toto.rehearsal import sandbox as sandboxes
from toto.rehearsal import suite, tap
from toto.rehearsal.phase_run import Endpoint, bench
from toto.rehearsal.results import PhaseResult
from toto.rehearsal.run import run_phase
from toto.rehearsal.sandbox import Sandbox
from toto.rehearsal.suite import Phase

verbs = Verbs()

_LINES: Final = 100  # of the tests that failed
_IN_SANDBOX: Final = (Phase.NO_INTERNET, Phase.WITH_INTERNET)

Name = Annotated[str, Argument(metavar="HOST")]
Commit = Annotated[
    str | None,
    Option(
        metavar="REV",
        help="commit, tag or branch (default: the working tree that you are in, else the deployed branch)",
        show_default=False,
    ),
]


@verbs.verb("sandbox")
async def sandbox(
    host: Name,
    commit: Commit = None,
    internet: Annotated[bool, Option("--internet", help="with internet, as in the phase with-internet")] = False,
    repo: Repo = None,
) -> int:
    """Boot a host's virtual machine, and be root in it until you leave.

    It is the one in which toto rehearses the host, on this machine, and it is gone when the shell is left. Commands on
    standard input are run in it; the exit status is 1 when that fails. It prints how to reach it by ssh meanwhile.
    """
    async with _booted(host, commit, repo) as (order, guest):
        if internet:
            await guest.set_internet(True)
        reach = f"ssh -F {guest.connection.config}"
        say(f"{host} is up, {'with' if internet else 'without'} internet. In other terminals, meanwhile:")
        say(f"    {reach} -o RequestTTY=auto {host}")
        for port in order.machine.ports if order.machine else ():
            say(f"    {reach} -N -L {port}:localhost:{port} {host}   # its port {port}, here")
        terminal = sys.stdin.isatty()
        shell = ["-o", "RequestTTY=yes", host] if terminal else [host, "--", "/bin/sh"]
        status = await process.attached([*guest.connection.through, "ssh", "-F", guest.connection.config, *shell])
    return 0 if terminal else int(status != 0)


@verbs.verb("test")
async def test(
    host: Name,
    phase: Annotated[Phase, Argument(metavar="PHASE", help="no-internet, with-internet, smoke or post-switch")],
    commit: Commit = None,
    in_sandbox: Annotated[
        bool, Option("--sandbox", help="smoke and post-switch too in the sandbox, with internet, not on the machine")
    ] = False,
    repo: Repo = None,
    as_json: AsJson = False,
) -> int:
    """Run a host's test scripts of one phase, and nothing else.

    Those of no-internet and with-internet run against its sandbox, which is booted for it; those of smoke and
    post-switch against the machine as it is, by the scripts of a commit of toto's repository, where toto logs in by the
    key that machines.yaml names, or the repository's own. Nothing is deployed. The exit status is 1 when a test fails.
    """
    if phase in _IN_SANDBOX or in_sandbox:
        result = await _in_sandbox(host, phase, commit, repo)
    else:
        result = await _on_machine(host, phase, commit, repo)
    rows = [dict(each) for each in result.rows()]
    text = "\n".join([table(rows, tuple(rows[0])), *result.failure_lines(_LINES)]) if rows else f"no {phase} tests"
    emit("tests", rows, text, as_json=as_json)
    return 0 if result.passed else 1


async def _in_sandbox(host: str, phase: Phase, commit: str | None, repo: Path | None) -> PhaseResult:
    async with _booted(host, commit, repo) as (order, guest):
        if phase is not Phase.NO_INTERNET:
            await guest.set_internet(True)
        ports = {port: guest.port(port) for port in (order.machine.ports if order.machine else ())}
        endpoint = Endpoint(guest.connection, ports, guest.network, guest.ssh.identity)
        return await _run(order.tree, order.scratch, host, phase, endpoint, order.settings)


async def _run(tree: Path, scratch: Path, host: str, phase: Phase, endpoint: Endpoint, rules: Settings) -> PhaseResult:
    async with bench(endpoint, host, phase, tree, scratch) as place:
        scripts, timeout = suite.find(tree, host), rules.sandbox.test_timeout
        return await run_phase(scripts, phase, place, tree=tree, timeout=timeout, on_line=say)


async def _on_machine(host: str, phase: Phase, commit: str | None, repo: Path | None) -> PhaseResult:
    place, run = infra(repo), f"test-{uuid.uuid4()}"
    async with runs.claimed(place, run) as scratch:
        tree = scratch / "tree"
        await git.checkout(place, git.resolve(place, commit or "HEAD"), tree)
        settings, manifest = read_tree(tree)
        machine = manifest.machines.get(host)
        if machine is None or not machine.deployed:
            raise InputError(
                "is no machine of the manifest that toto deploys",
                target=host,
                hint="--sandbox runs the tests in its VM",
            )
        owners.check(place, machine)
        identity = None if machine.deploy == "pull" else await keys.identity(place, machine.ssh.identity)
        async with access.connect(machine, place, run, settings, identity) as activator:
            await activator.prepare()
            endpoint = Endpoint.of(machine, activator)
            return await _run(tree, scratch, host, phase, endpoint, settings)


@asynccontextmanager
async def _booted(host: str, commit: str | None, repo: Path | None) -> AsyncIterator[tuple[HostOrder, Sandbox]]:
    """The host's VM, without internet, for the block; everything of it is gone after that."""
    tree = working.here(Path()) if commit is None and repo is None else None
    if tree is not None:
        place, revision = await working.commit(tree)
        say(f"{host} of the working tree {tree}")
    else:
        place = infra(repo)
        revision = git.resolve(place, commit or "HEAD")
        say(f"{host} of the commit {revision[:8]}")
    process.clean_up()
    runs.clean_up(place)  # what one left that was killed
    run = f"sandbox-{uuid.uuid4()}"
    async with runs.claimed(place, run):
        with progress.step(f"evaluating {host}"):
            order = await make.one(place, revision, run, Target(HOST, host))
        assert isinstance(order, HostOrder)
        with progress.step("building its VM") as hear:
            vm = await hosts.build_vm(order, Heard(hear))
        async with AsyncExitStack() as stack:
            with progress.step("booting it") as hear:
                guest = await stack.enter_async_context(_guest(order, vm, hear))
            yield order, guest


@asynccontextmanager
async def _guest(order: HostOrder, vm: Path, hear: LineSink) -> AsyncIterator[Sandbox]:
    """The VM, up; `hear` gets the lines of its console until then."""
    machine, settings, up = order.machine, order.settings.sandbox, False
    async with sandboxes.sandbox(
        vm,
        host=order.name,
        state=order.scratch / "sandboxes",
        key=await keys.private("sandbox"),
        ports=machine.ports if machine else (),
        memory=(machine and machine.memory) or settings.memory,
        cores=machine.cores if machine else None,
        most_memory=order.vm_memory,
        most_disk=order.vm_disk,
        boot_timeout=settings.boot_timeout,
        on_console=lambda line: None if up else hear(line),
    ) as guest:
        up = True
        yield guest


@verbs.verb("tap")
def judge(
    file: Annotated[str, Argument(metavar="FILE", help="- for standard input")],
    status: Annotated[
        int | None, Option(metavar="N", help="the exit status of the script that printed it", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Tell what toto thinks of a TAP document, as a test script prints it.

    The exit status is 0 when it passes, else 1.
    """
    report = tap.Judge()
    try:
        with sys.stdin if file == "-" else Path(file).open(errors="replace") as source:
            while line := source.readline(tap.LONGEST_LINE):
                report.line(line)
                while line and not line.endswith("\n"):  # the rest of one that is too long
                    line = source.readline(tap.LONGEST_LINE)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", target=file) from None
    found = report.report(status)
    tests = [
        {
            "number": str(each.number),
            "result": "failed" if each.failed else each.directive or "ok",
            "test": each.description,
            "why": "; ".join(filter(None, [each.reason, *each.diagnostics])),
        }
        for each in found.tests
    ]
    verdict = {"passed": found.passed, "summary": found.summary, "problems": list(found.problems), "tests": tests}
    said = f"{'passes' if found.passed else 'FAILS'}: {found.summary}"
    text = f"{table(tests, ('number', 'result', 'test', 'why'))}\n{said}" if tests else said
    emit("tap", [verdict], text, as_json=as_json)
    return 0 if found.passed else 1
