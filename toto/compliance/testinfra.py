"""pytest-testinfra (https://testinfra.readthedocs.io): how its modules are run in a cell, and what they report."""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from toto.cell.cell import python
from toto.compliance.checks import MODULES, Check
from toto.compliance.results import USUAL, Control, Outcome, clipped, number

SITE: Final = Path("/opt/testinfra")  # in the cell: the packages
RUNNER: Final = Path(__file__).with_name("runner.py")
TOLD: Final = (0, 1, 2, 5)  # exit statuses of pytest's for what its tests have told: passed, failed, not read, none
_PACKAGES: Final = ("testinfra", "pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments")


@cache
def site() -> Mapping[Path, Path]:
    """What a cell reads for it: each package, by its place there. (pytest-testinfra needs pytest's alone.)"""
    found = {}
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        file = Path(spec.origin)
        source = file.parent if file.name == "__init__.py" else file
        found[SITE / source.name] = source
    return found


def command(checks: Iterable[Check], host: str, runner: Path, results: Path) -> tuple[list[str], Mapping[Path, Path]]:
    """The command line for a cell, and what else the cell reads for it."""
    interpreter, mounts = python()
    wanted = json.dumps({str(each): each.controls for each in checks})
    words = ["env", *interpreter, "-IS", str(runner), str(SITE), str(results), host, wanted]
    return words, {**mounts, **site()}


def read(written: str, checks: Sequence[Check], problem: str = "") -> list[Control]:
    """The controls that the runner wrote down, a line of JSON each. What is no such line is passed over.

    A test that fails and whose end fails too is told once, as an error. Of a module that told nothing, and of all of
    them when there was a `problem`, one control more says so.
    """
    found: dict[tuple[str, str], Control] = {}
    for line in _lines(written):
        control = _control(line)
        key = (control.check, control.id)
        found[key] = control if control.outcome is Outcome.ERROR else found.get(key, control)
    controls, heard = list(found.values()), {check for check, _ in found}
    if problem:
        return [*controls, Control.broken(MODULES, problem)]
    none = "it has no tests: functions whose names begin with test_"
    return [*controls, *(Control.broken(str(each), none) for each in checks if str(each) not in heard)]


def _lines(written: str) -> Iterator[dict[str, Any]]:
    for line in written.splitlines():
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):  # (a line that was cut off, or was written by who knows what)
            continue
        if isinstance(said, dict):
            yield said


def _control(said: Mapping[str, Any]) -> Control:
    check = clipped(said.get("module") or MODULES)
    if "broken" in said:
        return Control.broken(check, f"pytest cannot read it: {said['broken']}")
    if "none" in said:
        names = " or ".join(map(str, said["none"])) if isinstance(said["none"], list) else ""
        return Control.broken(check, f"has no test {names}; see `controls` in toto.toml")
    outcome, impact = str(said.get("outcome")), said.get("impact")
    return Control(
        check=check,
        id=clipped(said.get("id")),
        outcome=Outcome(outcome) if outcome in list(Outcome) else Outcome.ERROR,
        impact=USUAL if impact is None else number(impact, 1.0),
        title=clipped(said.get("title") or ""),
        message=clipped(said.get("message") or ""),
        resource=clipped(said.get("resource") or ""),
        seconds=number(said.get("seconds")),
    )
