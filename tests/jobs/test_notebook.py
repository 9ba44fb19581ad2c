"""The chart of jobs in notebooks/history.ipynb. (tests/lab runs all notebooks, on a fleet.)"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest

from toto.base import paths
from toto.jobs.history import History, State

NOTEBOOK = Path(__file__).parents[2] / "notebooks/history.ipynb"


@pytest.mark.parametrize("there", [True, False])
def test_jobs_are_charted_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setenv(paths.STATE, str(tmp_path / "state"))
    mpl.use("Agg")
    repo = tmp_path / "infra.git"
    history = History(repo)
    for state in (State.SUCCESS, State.FAILED, State.ABORTED, State.SUCCESS) if there else ():
        history.end(history.begin(history.queue("backup"), "default"), state)
    history.queue("waits")
    (cell,) = (each for each in nbformat.read(NOTEBOOK, as_version=4).cells if "toto.jobs.history" in each.source)
    names: dict[str, Any] = {"repo": repo, "plt": plt}
    exec(cell.source, names)
    (panel,) = names["figure"].axes
    assert panel.get_title() == ("backup: 2 of 4 succeeded" if there else "No job has run yet: toto job run")
    assert len(panel.collections) == (3 if there else 0)
    plt.close("all")
