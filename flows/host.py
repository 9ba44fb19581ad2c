"""The steps of one host: rehearse, roll out, revert."""

from typing import Literal, TypeAlias

from prefect import flow
from prefect.logging import get_run_logger
from prefect.utilities.annotations import quote

from tasks.record import intend, record_good, record_unreachable, record_verified
from tasks.rehearse import build_system, build_vm, in_sandbox, run_tests, show_difference
from tasks.roll_out import (
    activate,
    add_gc_root,
    claim,
    clean_up,
    connect,
    copy,
    find_drift,
    inspect,
    keep,
    revert,
    try_out,
    try_way_in,
)
from toto.machine.fleet_builders import not_building
from toto.machine.ssh import AuthenticationFailed, HostKeyChanged, Unreachable
from toto.plan.changes import Action
from toto.plan.host import HostOrder
from toto.plan.verdict import Verdict
from toto.rehearsal.phase_run import Endpoint
from toto.rehearsal.results import Rehearsal
from toto.rehearsal.suite import Phase

Outcome: TypeAlias = Literal["deployed", "verified", "tried", "unreachable"]

__all__ = ["find_drift", "rehearse", "revert", "roll_out"]


@flow(name="rehearse host", flow_run_name="{order.name}", persist_result=False, validate_parameters=False)
async def rehearse(order: HostOrder) -> Verdict[Rehearsal]:
    """Build the host and its VM, and test it in the VM: first without internet, then with it."""
    system = await build_system(order)
    vm = await build_vm(order)
    difference = await show_difference(order, wait_for=[system])
    found = await in_sandbox(order, vm)
    summary = "; ".join(filter(None, (str(found), *dict.fromkeys((system.who, vm.who)))))
    return Verdict.passed(order, found, summary=summary, difference=difference, cached=found.run != order.run)


@flow(name="roll out host", flow_run_name="{order.name}", persist_result=False, validate_parameters=False)
async def roll_out(order: HostOrder, verdict: Verdict[Rehearsal]) -> Outcome:
    """Copy the rehearsed closure to the machine, activate it, test, make it permanent, test again, and record it."""
    verdict.check(order)
    machine = order.machine
    assert machine is not None
    intended = False
    try:
        async with (
            not_building(machine, patience=order.settings.nix.build_timeout),
            connect(machine, order.repo, order.run, order.settings) as activator,
        ):
            await claim(order, activator)
            smoke, post_switch = (
                run_tests.with_options(task_run_name=f"{phase} tests") for phase in (Phase.SMOKE, Phase.POST_SWITCH)
            )
            if order.change.action is Action.VERIFY:
                before = await inspect(order, activator, expected=order.last.path if order.last else None)
                done = await post_switch(order, Phase.POST_SWITCH, Endpoint.of(machine, activator), wait_for=[before])
                await record_verified(order, wait_for=[done])
                return "verified"
            copied = await copy(order, activator)
            before = await inspect(order, activator, wait_for=[copied])
            before = await try_way_in(order, activator, before)
            intended = True
            step: object = await intend(order, before)
            if machine.activation == "boot":
                step = await activate.with_options(task_run_name="set for the next boot")(
                    order, activator, "boot", quote(before), wait_for=[step]
                )
            else:
                step = await activate.with_options(task_run_name="activate: test")(
                    order, activator, "test", quote(before), wait_for=[step]
                )
                step = await smoke(order, Phase.SMOKE, Endpoint.of(machine, activator), wait_for=[step])
                if order.try_for:
                    await try_out(order, wait_for=[step])
                    return "tried"
                if machine.activation == "switch":
                    step = await activate.with_options(task_run_name="activate: switch")(
                        order, activator, "switch", quote(before), wait_for=[step]
                    )
                step = await post_switch(order, Phase.POST_SWITCH, Endpoint.of(machine, activator), wait_for=[step])
            if machine.activation != "switch" and machine.by_document:
                step = await keep(order, activator, machine.activation, wait_for=[step])
            step = await add_gc_root(order, wait_for=[step])
            step = await record_good(order, wait_for=[step])
            await clean_up(order, activator, wait_for=[step])
            return "deployed"
    except Unreachable as error:
        if intended or isinstance(error, AuthenticationFailed | HostKeyChanged):
            raise
        get_run_logger().warning("%s", error)
        await record_unreachable(order, str(error))
        return "unreachable"
