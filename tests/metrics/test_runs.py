"""Whether the figures of runs call things as the flows and tasks do."""

import importlib
from pathlib import Path
from typing import Final

import yaml

from tasks.jobs import state_of
from toto.jobs import registered
from toto.jobs.history import Run, State
from toto.metrics import runs
from toto.rehearsal.suite import Phase
from toto.report.report import PARTIAL

ROOT: Final = Path(__file__).parents[2]


def test_phases_and_actions_are_called_as_in_flows_and_tasks() -> None:
    text = "".join(file.read_text() for folder in ("flows", "tasks") for file in (ROOT / folder).glob("*.py"))
    for phase in set(runs.PHASES) - {f"{each} tests" for each in Phase}:
        assert f'task_run_name="{phase}"' in text, phase
    assert 'task_run_name=f"{phase} tests"' in text and {f"{each} tests" for each in Phase} <= set(runs.PHASES)
    for name in runs.NAMED:
        assert f'task_run_name=f"{name} {{' in text, name
    assert runs.PARTIAL == PARTIAL and runs.JOB == registered.FLOW
    aborted = state_of(Run(job="backup", number=1, state=State.ABORTED))
    assert aborted.name == runs.ABORTED


def test_there_is_an_action_for_each_deployment() -> None:
    deployed = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    flows = set()
    for module, _, function in (each["entrypoint"].rpartition(".") for each in deployed):
        flows.add(getattr(importlib.import_module(module), function).name)
    assert flows == {"reconcile", *runs.ACTIONS} - {*runs.OF_RECONCILE}
