"""What makes a function a stage of a run: a subflow that takes the run and returns it."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias
from uuid import UUID

from prefect import flow, get_client, runtime
from prefect.logging import get_run_logger
from prefect.states import Failed

from tasks.run import Run

Stage: TypeAlias = Callable[[Run], Coroutine[Any, Any, Run]]


def stage(name: str, about: Callable[[Run], str]) -> Callable[[Callable[[Run], Awaitable[None]]], Stage]:
    """Make a stage called `name` of a function; its run is called what it is `about`.

    In the graph it comes after the stage whose run it takes. It is red when a target failed in it, although the run
    goes on, to revert and to report.
    """

    def make(work: Callable[[Run], Awaitable[None]]) -> Stage:
        def run_name() -> str:
            return about(runtime.flow_run.parameters["run"])

        @flow(
            name=name, description=work.__doc__, flow_run_name=run_name, persist_result=False, validate_parameters=False
        )
        async def subflow(run: Run) -> Run:
            run.stage = str(runtime.flow_run.id)
            await work(run)
            return run

        async def staged(run: Run) -> Run:
            before = set(run.problems)
            run = await subflow(run)
            if failed := [each for each in run.problems if each not in before]:
                await _mark_failed(UUID(run.stage), "; ".join(failed))
            return run

        return staged

    return make


async def _mark_failed(subflow: UUID, message: str) -> None:
    try:
        async with get_client() as client:
            await client.set_flow_run_state(subflow, Failed(message=message), force=True)
    except Exception as error:  # it only looks better than it was
        get_run_logger().warning("the failure of a stage could not be shown: %s", error)
