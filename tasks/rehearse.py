"""Rehearse: build a host and its VM, boot the VM without internet, test it, give it internet, test it again."""

import asyncio
import hashlib
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from tasks import compliance, report, sink
from tasks.limits import room_for_sandbox
from toto.base import paths
from toto.base.errors import TotoError
from toto.machine import keys
from toto.nix import commands as nix
from toto.nix.builders import Heard
from toto.plan import host
from toto.plan.changes import Action
from toto.plan.host import HostOrder
from toto.rehearsal import suite
from toto.rehearsal.errors import BootTimeout
from toto.rehearsal.phase_run import Endpoint, PhasePassed, bench
from toto.rehearsal.results import Rehearsal
from toto.rehearsal.run import run_phase
from toto.rehearsal.sandbox import sandbox
from toto.rehearsal.suite import Phase


@dataclass(frozen=True)
class Built:
    """What was built, and who built it, in words; "" when it was there already."""

    path: Path
    who: str


class TestsFailed(TotoError):
    """Not all tests of a phase passed. The message has the failing tests' own lines."""


async def _may_pass_next_time(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether a failure may be transient: a substituter was down, or a VM did not boot in time."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, BootTimeout) or (isinstance(error, nix.BuildFailed) and error.transient)


@task(
    name="build the system",
    task_run_name="build the system",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_may_pass_next_time,
)
async def build_system(order: HostOrder) -> Built:
    """Build the toplevel; a GC root keeps it until the run ends. Raises `BuildFailed`."""
    heard = Heard(sink())
    return Built(await host.build_toplevel(order, heard), heard.who)


@task(
    name="build the VM",
    task_run_name="build the VM",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_may_pass_next_time,
)
async def build_vm(order: HostOrder) -> Built:
    """Build the VM; a GC root keeps it until the run ends. Raises `BuildFailed`."""
    heard = Heard(sink())
    return Built(await host.build_vm(order, heard), heard.who)


@task(name="what changes", task_run_name="what changes", cache_policy=NO_CACHE)
async def show_difference(order: HostOrder) -> str:
    """What changes from the last good to the rehearsed system, as text; also shown as an artifact."""
    text = "nothing in the closure" if order.change.action is Action.VERIFY else str(await host.difference(order))
    await report.show_difference(order.repo, order.target, text)
    return text


def verdict_key(_context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The cache key of a verdict. It depends on the VM, the test scripts and the sandbox settings, and nothing else."""
    order: HostOrder = parameters["order"]
    machine = order.machine
    settings = order.settings.sandbox.model_dump_json() + (
        machine.model_dump_json(include={"ports", "memory", "cores"}) if machine else ""
    )
    what = "\n".join((order.vm, order.host.tests, settings))
    return f"toto-rehearsal-v2-{hashlib.sha256(what.encode()).hexdigest()}"


@task(
    name="sandbox",
    task_run_name="sandbox",
    cache_policy=CacheKeyFnPolicy(cache_key_fn=verdict_key),
    persist_result=True,
    result_serializer="json",
    cache_expiration=timedelta(days=90),
    retries=1,
    retry_delay_seconds=5,
    retry_condition_fn=_may_pass_next_time,
)
async def in_sandbox(order: HostOrder, vm: Built) -> Rehearsal:
    """Boot the VM and run both phases in it. Only a pass is cached; a failure, cancel or timeout is an exception.

    Raises `TestsFailed`, `BootTimeout` and the sandbox's other errors.
    """
    logger, machine, settings = get_run_logger(), order.machine, order.settings.sandbox
    ports = machine.ports if machine else ()
    tests: dict[str, int] = {}
    console: deque[str] = deque(maxlen=300)
    log_console = sink("console: ", 200)

    def on_console(line: str) -> None:
        console.append(line)
        log_console(line)

    async with room_for_sandbox():
        began = time.monotonic()
        try:
            async with sandbox(
                vm.path,
                host=order.name,
                state=order.scratch / "sandboxes",
                key=await keys.private("sandbox"),
                ports=ports,
                memory=(machine and machine.memory) or settings.memory,
                cores=machine.cores if machine else None,
                most_memory=order.vm_memory,
                most_disk=order.vm_disk,
                boot_timeout=settings.boot_timeout,
                on_console=on_console,
            ) as guest:
                seconds = {"boot": time.monotonic() - began}
                logger.info("booted and answers ssh after %.1f s", seconds["boot"])
                endpoint = Endpoint(
                    guest.connection, {port: guest.port(port) for port in ports}, guest.network, guest.ssh.identity
                )
                before: object = vm  # draws the edges: build, no-internet, with-internet
                for phase in (Phase.NO_INTERNET, Phase.WITH_INTERNET):
                    if phase is Phase.WITH_INTERNET:
                        routed = await guest.set_internet(True)
                        logger.info("the internet is on%s", "" if routed else ", but the host has no route to it")
                    before = result = await run_tests.with_options(task_run_name=f"{phase} tests")(
                        order, phase, endpoint, wait_for=[before]
                    )
                    tests[phase], seconds[phase] = result.tests, result.seconds
        finally:
            await report.show_console(order.repo, order.target, "\n".join(console))
    return Rehearsal(host=order.name, vm=order.vm, run=order.run, tests=tests, seconds=seconds)


@task(name="tests", task_run_name="tests", cache_policy=NO_CACHE)
async def run_tests(order: HostOrder, phase: Phase, endpoint: Endpoint) -> PhasePassed:
    """Run a phase's test scripts against the sandbox or the machine. Raises `TestsFailed`."""
    logger, settings = get_run_logger(), order.settings.sandbox
    found = suite.find(order.tree, order.name)
    try:
        async with (
            asyncio.timeout(settings.phase_timeout),
            bench(endpoint, order.name, phase, order.tree, order.scratch) as place,
        ):
            result = await run_phase(
                found,
                phase,
                place,
                tree=order.tree,
                timeout=settings.test_timeout,
                keep=settings.test_output,
                on_line=sink(),
                on_result=lambda each: logger.info("%s: %s", each.script.name, each.reason or each.report.summary),
            )
            if result.passed:
                await compliance.gate(order, phase, place)
    except TimeoutError:
        raise TestsFailed(
            f"{phase} tests did not end within {settings.phase_timeout:g} s",
            target=order.name,
            hint="see which one hangs in the log, or raise sandbox.phase_timeout in toto.toml",
        ) from None
    if result.results:
        await report.show_tests(order.repo, order.target, result)
        junit = paths.repo_state(order.repo) / "junit"
        junit.mkdir(exist_ok=True)
        (junit / f"{order.name}.{phase}.xml").write_text(result.junit_xml())
    else:
        logger.info("no %s tests", phase)
    if not result.passed:
        first, *rest = result.failure_lines(20)
        raise TestsFailed(
            "\n".join((f"{phase} tests failed: {first}", *rest)),
            target=order.name,
            hint=f"fix the configuration or the tests in tests/{order.name}/{phase}/, and push again",
        )
    return PhasePassed.of(result)
