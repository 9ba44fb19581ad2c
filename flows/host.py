"""One host: its rehearsal, and its roll-out."""

from typing import Literal

from prefect import flow
from prefect.logging import get_run_logger

from tasks.record import intend, record_good, record_unreachable, record_verified
from tasks.rehearse import Verdict, build, in_sandbox, show_difference, trial
from tasks.roll_out import activate, copy, keep, look, reach, reached, tidy
from toto.machine.ssh import AuthenticationFailed, HostKeyChanged, Unreachable
from toto.plan.changes import Action
from toto.plan.order import HostOrder
from toto.rehearsal.suite import Phase


@flow(flow_run_name="{order.name}: rehearse", persist_result=False)
async def rehearse(order: HostOrder) -> Verdict:
    """Build the host and its VM, and test it in there: first without internet, then with it."""
    await build.with_options(task_run_name="build the system")(order, "toplevel")
    vm = await build.with_options(task_run_name="build the VM")(order, "vm")
    await show_difference(order)
    return await in_sandbox(order, vm)


@flow(flow_run_name="{order.name}: roll out", persist_result=False)
async def roll_out(order: HostOrder) -> Literal["deployed", "verified", "unreachable"]:
    """Bring the rehearsed closure to the machine: activate, test, make it permanent, test again, record."""
    machine, settings = order.machine, order.settings.roll_out
    assert machine is not None
    intended = False
    try:
        async with reach(machine, order.repo, order.run, settings.connect_timeout) as activator:
            where = reached(machine, activator)
            if order.change.action is Action.VERIFY:
                await look(activator, expected=order.change.last.path if order.change.last else None)
                await trial.with_options(task_run_name="post-switch tests")(order, Phase.POST_SWITCH, where)
                await record_verified(order)
                return "verified"
            await copy(order, activator)
            before = await look(activator)
            intended = True
            await intend(order, before)
            if machine.activation == "boot":
                await activate.with_options(task_run_name="set for the next boot")(order, activator, "boot", before)
            else:
                await activate.with_options(task_run_name="activate: test")(order, activator, "test", before)
                await trial.with_options(task_run_name="smoke tests")(order, Phase.SMOKE, where)
                if machine.activation == "switch":
                    await activate.with_options(task_run_name="activate: switch")(order, activator, "switch", before)
                await trial.with_options(task_run_name="post-switch tests")(order, Phase.POST_SWITCH, where)
            await keep(order)
            await record_good(order)
            await tidy(activator)
            return "deployed"
    except Unreachable as error:
        if intended or isinstance(error, AuthenticationFailed | HostKeyChanged):
            raise
        get_run_logger().warning("%s", error)
        await record_unreachable(order, str(error))
        return "unreachable"
