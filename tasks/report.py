"""Shows a run in the UI, as artifacts: the plan, the tests of each phase, what failed and what was reverted."""

import asyncio
import functools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, ParamSpec
from uuid import UUID

from prefect.artifacts import (
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)
from prefect.logging import get_run_logger

from toto.base import process
from toto.compliance.results import Control, summary
from toto.fleet import artifacts, builds, results
from toto.git_host.shared import name_of
from toto.ledger.target import Target
from toto.plan.alike import alike, all_of, listed
from toto.plan.changes import COLUMNS, ChangeSet
from toto.plan.order import Plan
from toto.rehearsal.results import PhaseResult
from toto.rehearsal.suite import Phase
from toto.report.message import MARKDOWN
from toto.report.report import Report
from toto.terraform.plan import Planned

P = ParamSpec("P")
SHOWN_EVERY: Final = 5  # seconds between two updates of a progress bar


def _best_effort(show: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """Turn any error into a warning in the log: an artifact that cannot be written must not fail a roll-out."""

    @functools.wraps(show)
    async def attempt(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await show(*args, **kwargs)
        except Exception as error:
            get_run_logger().warning("could not write an artifact: %s", error)

    return attempt


class Progress:
    """How many of a commit's evaluations have ended, as a progress bar in the UI when they take their time."""

    def __init__(self, repo: Path, count: int) -> None:
        self.repo, self.count, self.ended = repo, count, 0
        self._artifact: UUID | None = None

    def note(self) -> None:
        """One more has ended."""
        self.ended += 1

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Show it until the end of the block, from `SHOWN_EVERY` seconds on."""
        showing = asyncio.create_task(self._keep_showing())
        try:
            yield
        finally:
            showing.cancel()
            await asyncio.wait((showing,))
        if self._artifact is not None:
            await self._show()

    async def _keep_showing(self) -> None:
        while True:
            await asyncio.sleep(SHOWN_EVERY)
            await self._show()

    @_best_effort
    async def _show(self) -> None:
        percent, said = 100 * self.ended / self.count, f"{self.ended} of {self.count} hosts are evaluated"
        if self._artifact is None:
            key = artifacts.of_repo("evaluation", name_of(self.repo))
            self._artifact = await acreate_progress_artifact(percent, key=key, description=said)
        else:
            await aupdate_progress_artifact(self._artifact, percent, description=said)


@_best_effort
async def show_plan(plan: Plan, differences: dict[str, str] | None = None) -> None:
    """Show the change set as a page, also in the log. Call it again with the `differences` once they are known.

    (Errors are in the log once, as the run's report ends it.)
    """
    if differences is None:
        get_run_logger().info("the plan of %s:\n%s", plan.commit[:8], plan.changes)
        for each in plan.changes.excused:
            get_run_logger().warning("%s", each.message)
    await acreate_markdown_artifact(
        key=artifacts.of_repo("plan", name_of(plan.repo)),
        markdown=plan_page(plan.changes, differences or {}),
        description=f"The plan of {plan.commit[:8]}",
    )


def plan_page(changes: ChangeSet, differences: Mapping[str, str]) -> str:
    """The plan as Markdown: a table, then the errors, and what changes in each target, as a diff."""
    long = {label: text for label, text in differences.items() if "\n" in text}
    short = {label: text for label, text in differences.items() if label not in long}
    rows = [[row[column] for column in COLUMNS] for row in changes.rows(short | dict.fromkeys(long, "see below"))]
    parts = [f"**{changes.nothing}**"] if changes.nothing else []
    parts += [markdown_table(COLUMNS, rows) if rows else "nothing to do"]
    parts += [f"⚠ {MARKDOWN.escape(each)} ({', '.join(names)})" for each, names in changes.warnings.items()]
    for error in changes.errors:
        parts += [f"## {listed(error.names)}: evaluation failed", *_cause("", error.text, error.names)]
    for label, text in long.items():
        parts += [f"## {label}", as_diff(text)]
    return "\n\n".join(parts)


@_best_effort
async def show_tests(repo: Path, target: Target, result: PhaseResult) -> None:
    """Show the tests of one phase as a table."""
    await acreate_table_artifact(
        key=artifacts.of_target(result.phase, name_of(repo), target),
        table=[dict(row) for row in result.rows()],
        description=f"{target.label}: {result.phase} tests",
    )


@_best_effort
async def show_compliance(
    repo: Path, target: Target, controls: Sequence[Control], *, phase: Phase | None = None
) -> None:
    """Show what compliance checks found on a machine; with `phase`, what they found there did not let it stay so."""
    what = "compliance" if phase is None else f"{phase}-compliance"
    await acreate_table_artifact(
        key=artifacts.of_target(what, name_of(repo), target),
        table=[each.row() for each in controls],
        description=f"{target.label}: {'' if phase is None else f'{phase} '}compliance: {summary(controls)}",
    )


@_best_effort
async def show_console(repo: Path, target: Target, text: str) -> None:
    """Show the end of a sandbox's console."""
    await acreate_markdown_artifact(
        key=artifacts.of_target("console", name_of(repo), target),
        markdown=fenced(process.tail(text, 300)),
        description=f"{target.label}: console of its sandbox",
    )


@_best_effort
async def show_difference(repo: Path, target: Target, text: str) -> None:
    """Show what changes in a target: a host's closure or a release's manifests."""
    await acreate_markdown_artifact(
        key=artifacts.of_target("difference", name_of(repo), target),
        markdown=as_diff(text),
        description=f"{target.label}: what changes",
    )


@_best_effort
async def show_terraform_plan(repo: Path, target: Target, planned: Planned, *, back: bool = False) -> None:
    """Show what a terraform plan would do; with `back` it is the plan of a revert."""
    text = str(planned)
    drift = [line for change in planned.drift for line in change.lines]
    if drift:
        text += "\n\nchanged outside since the last apply:\n" + "\n".join(drift)
    await acreate_markdown_artifact(
        key=artifacts.of_target("back" if back else "plan", name_of(repo), target),
        markdown=as_diff(text),
        description=f"{target.label}: {'back: ' if back else ''}{planned.summary}",
    )


@_best_effort
async def show_report(report: Report) -> None:
    """Show the report of a run as one page, failures first, and a short form in the last lines of the log."""
    logger = get_run_logger()
    for cause in report.causes:
        logger.error("%s", "\n".join(filter(None, (f"{cause.title}: {cause.said.text}", all_of(cause.said.names)))))
    for back in report.reverted:
        if back.error:
            logger.error("%s COULD NOT BE REVERTED: %s", back.target, back.error)
        else:
            logger.warning("%s was reverted to %s", back.target, back.to)
    logger.log(logging.ERROR if report.failed else logging.INFO, "%s", report.headline())
    await acreate_markdown_artifact(
        key=artifacts.of_repo("report", report.repo), markdown=as_markdown(report), description=report.headline()
    )


@_best_effort
async def show_results(report: Report) -> None:
    """Keep how a run ended for each of its targets, for the page of the fleet."""
    await acreate_table_artifact(
        key=results.key(report.repo), table=report.results(), description=f"Targets of {report.commit[:8]}"
    )


@_best_effort
async def show_builds(repo: Path, commit: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Keep what was built of a commit, for the page of builds."""
    table = [dict(row) for row in rows]
    await acreate_table_artifact(key=builds.key(name_of(repo)), table=table, description=commit)


def as_markdown(report: Report) -> str:
    """The report as Markdown: what is wrong and the next step for it, then what was reverted, targets and timing.

    (The UI has the artifact's description above it: the result in one line.)
    """
    if report.failed:
        after = report.aftermath()
        parts = [f"# 🔴 {report.commit[:8]} failed{f': {MARKDOWN.escape(after)}' if after else ''}"]
    else:
        parts = [f"# {'🟠 Partial' if report.partial else '🟢 Done'}"]
    for back in report.reverted:
        if back.error:
            parts += [f"## {back.target} COULD NOT BE REVERTED", *_cause(back.target, back.error)]
    for cause in report.causes:
        parts += [f"## {cause.title}", *_cause("", cause.said.text, cause.said.names)]
    for away in alike((name, report.away.get(name, "")) for name in report.unreachable):
        parts += [f"## {listed(away.names)}: unreachable", *_cause("", away.text, away.names)]
    if report.reverted:
        parts += [
            "## Reverted",
            markdown_table(
                ("target", "result", "what it is now"),
                [
                    (each.target, "could not be reverted" if each.error else "reverted", each.to)
                    for each in report.reverted
                ],
            ),
        ]
    if rows := report.rows():
        parts += ["## Targets", markdown_table(("target", "result", "more"), rows)]
    if timing := report.timing():
        parts += ["## Timing", fenced(timing)]
    return "\n\n".join(parts)


def _cause(target: str, text: str, names: Sequence[str] = ()) -> list[str]:
    """An error as Markdown: all its targets where the title leaves some out, the next step, then what was said."""
    said, _, hint = text.removeprefix(f"{target}: ").rpartition("\nnext: ")
    if not said or "\n" in hint:
        said, hint = text.removeprefix(f"{target}: "), ""
    parts = (all_of(names), f"**Next:** {MARKDOWN.escape(hint)}" if hint else "", fenced(said) if said else "")
    return [each for each in parts if each]


def fenced(text: str, language: str = "text") -> str:
    """Text as a Markdown code block, even if it contains fences itself."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def as_diff(text: str) -> str:
    """Lines with `+` and `-` as a code block that shows them as added and removed: the sign has to come first."""
    return fenced(re.sub(r"^( +)([+-])(?= )", r"\2\1", text, flags=re.MULTILINE), "diff")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Characters that would break it are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])
