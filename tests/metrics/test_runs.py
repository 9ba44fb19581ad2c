"""Whether the figures of runs call things as the flows and tasks do."""

from pathlib import Path
from typing import Final

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
    for action in set(runs._ACTIONS) - {"deploy", "rehearse", "plan"}:
        assert f'@flow(name="{action}"' in text or f'    name="{action}",' in text, action
    assert '    name="reconcile",' in text and runs.PARTIAL == PARTIAL
