"""Compliance: check a machine, or the sandbox that stands for it, by the checks of the infra repo."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks import report, sink
from tasks.roll_out import connect
from toto.base import paths
from toto.base.errors import TotoError
from toto.compliance import checks, history
from toto.compliance.results import GATE, Control, NotCompliant, Outcome, counts, failure_lines, junit_xml, summary
from toto.compliance.run import Bench, run_checks
from toto.infra_repo.manifest import Machine, Manifest
from toto.infra_repo.settings import Settings
from toto.ledger.ledger import Ledger
from toto.ledger.target import HOST, Target
from toto.machine import owners
from toto.plan.host import HostOrder
from toto.plan.selector import Selector
from toto.rehearsal import phase_run
from toto.rehearsal.phase_run import Endpoint
from toto.rehearsal.suite import Phase
from toto.report.report import Report

PULLS: Final = "it pulls: toto runs no command on it, so nothing is known of it"


def chosen(
    repo: Path, tree: Path, manifest: Manifest, settings: Settings, only: Sequence[str], report: Report
) -> tuple[dict[str, tuple[checks.Check, ...]], dict[str, str]]:
    """The machines to check, of those that toto has deployed, and by what; and of which nothing can be known, and why.

    The report is told which are held back. Raises `InputError` for words in `only` that match no target, and for
    checks that would never run.
    """
    ledger, selector = Ledger(repo).read(), Selector(only, manifest)
    found: dict[str, tuple[checks.Check, ...]] = {}
    not_known: dict[str, str] = {}
    for name, machine in manifest.machines.items():
        target = Target(HOST, name)
        due = machine.deployed and checks.includes(settings.compliance, machine.tags)
        entry, of_machine = ledger.get(target), checks.find(tree, settings.compliance, machine.tags)
        if not selector.takes(target, machine.tags, due=due):
            continue
        if entry.good is None or not machine.deployed:
            if selector.names(target):
                not_known[name] = "toto has not deployed it"
        elif not of_machine:
            if selector.names(target):
                not_known[name] = "no check is for this machine"
        elif machine.deploy == "pull":
            not_known[name] = PULLS
        elif entry.intent is not None:
            report.held[name] = "it is being changed"
        else:
            found[name] = of_machine
    selector.check()
    return found, not_known


@task(name="check", task_run_name="check", cache_policy=NO_CACHE)
async def check_machine(
    repo: Path,
    run: str,
    commit: str,
    machine: Machine,
    by: tuple[checks.Check, ...],
    settings: Settings,
    tree: Path,
    scratch: Path,
) -> list[Control]:
    """Check a machine by checks of a commit, which is exported at `tree`; show and record what was found.

    Raises `NotOwned`, `Unreachable` and its subclasses.
    """
    owners.check(repo, machine)
    async with (
        connect(machine, repo, run, settings) as activator,
        phase_run.bench(Endpoint.of(machine, activator), machine.name, Phase.POST_SWITCH, tree, scratch) as place,
    ):
        controls = await _checked(by, place, machine.name, settings, tree, scratch)
    await keep(repo, run, commit, machine.name, controls)
    return controls


def judge(found: Report, machine: str, controls: Sequence[Control]) -> str:
    """Tell the report how a machine is; return what is not known of it, in words."""
    if bad := failure_lines(controls):
        found.failure(
            machine,
            "compliance check",
            NotCompliant(
                "\n".join((f"{summary(controls)}:", *bad)),
                target=machine,
                hint="fix the machine or the check, or waive the control with a reason (docs/compliance.md)",
            ),
        )
    else:
        found.outcome[machine] = "checked"
    skipped = counts(controls)[Outcome.NOT_CHECKED]
    return f"{skipped} {'control was' if skipped == 1 else 'controls were'} not checked" if skipped else ""


async def gate(order: HostOrder, phase: Phase, place: phase_run.Bench) -> None:
    """Check a host in the sandbox, with internet, or on its machine, after the switch, where compliance is a gate.

    What is found on the machine is recorded when it stays as it is. Raises `NotCompliant` when a control fails that
    stops a roll-out.
    """
    tags = order.machine.tags if order.machine else ()
    if phase not in (Phase.WITH_INTERNET, Phase.POST_SWITCH) or not checks.gated(order.settings, tags):
        return
    found = checks.find(order.tree, order.settings.compliance, tags)
    if not found:
        return
    if order.machine is not None and order.machine.deploy == "pull" and phase is Phase.POST_SWITCH:
        get_run_logger().warning("compliance is not checked: %s", PULLS)
        return
    controls = await _checked(found, place, order.name, order.settings, order.tree, order.scratch)
    stopping = [each for each in controls if each.stops]
    if stopping:
        await report.show_compliance(order.repo, order.target, controls, phase=phase)
        first, *rest = failure_lines(stopping)
        raise NotCompliant(
            "\n".join((f"{phase} compliance: controls of impact {GATE} or more failed:", first, *rest)),
            target=order.name,
            hint="fix the configuration or the checks, or waive the control with a reason (docs/compliance.md)",
        )
    if phase is Phase.POST_SWITCH:
        await keep(order.repo, order.run, order.commit, order.name, controls)


async def keep(repo: Path, run: str, commit: str, machine: str, controls: list[Control]) -> None:
    """Show and record what was found on a machine; that it cannot be kept is a warning."""
    await report.show_compliance(repo, Target(HOST, machine), controls)
    try:
        if different := await history.record(repo, machine, controls, commit, run):
            get_run_logger().info("%s: %s", machine, different)
        junit = paths.repo_state(repo) / "junit"
        junit.mkdir(exist_ok=True)
        (junit / f"{machine}.compliance.xml").write_text(junit_xml(machine, controls))
    except (TotoError, OSError) as error:
        get_run_logger().warning("what was found could not be recorded: %s", error)


async def _checked(
    found: tuple[checks.Check, ...], place: phase_run.Bench, host: str, settings: Settings, tree: Path, scratch: Path
) -> list[Control]:
    bench = Bench(host, place.cell, place.env, tree, scratch, settings.compliance.timeout, sink())
    controls = await run_checks(found, bench)
    get_run_logger().info("compliance of %s: %s", host, summary(controls))
    return controls
