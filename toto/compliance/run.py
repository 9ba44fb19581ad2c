"""Running compliance checks in a cell, against the machine that `on-host` reaches there.

A profile or a module is a program that somebody pushed. It has no key and no connection of the machine: all that it
asks goes through `on-host` (`toto.rehearsal.on_host`), which the cell is given with.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from toto.base import owned
from toto.base.errors import TotoError
from toto.base.process import CommandTimeout, LineSink, Pushed, run, tail
from toto.cell import folders
from toto.cell.cell import INFRA, Cell
from toto.cell.limits import Limits
from toto.cell.tool import Tool, tool
from toto.compliance import door, inspec, testinfra
from toto.compliance.checks import Check
from toto.compliance.results import Control, bounded

RESULTS: Final = Path("/results")  # in the cell: the folder that a check writes to
_LARGEST: Final = 50_000_000  # bytes of a report
_DISK: Final = 500_000_000  # bytes that a check may write there
_OMNIBUS: Final = Path("/opt")  # where the packages of InSpec and cinc-auditor are, each in a folder of its own
_LICENCE: Final = "CHEF_LICENSE"
_FILES: Final = {"waivers.yaml": "--waiver-file", "inputs.yaml": "--input-file"}


@dataclass(frozen=True)
class Bench:
    """Where checks run: a cell in which the commit is at /infra, and `on-host`, on the PATH of `env`, is the machine.

    `tree` is the exported commit, `scratch` a folder for toto's own files, `timeout` the seconds for a profile, or for
    all modules. `on_line` gets each line that they print.
    """

    host: str
    cell: Cell
    env: Mapping[str, str]
    tree: Path
    scratch: Path
    timeout: float
    on_line: LineSink | None = None


async def run_checks(checks: Sequence[Check], bench: Bench) -> list[Control]:
    """Run checks one after the other; all modules of testinfra are one run of pytest. What fails stops none of them.

    What needs a person comes first.

    What keeps a check from running is a control of its own, so that only a cancel raises.
    """
    found: list[Control] = []
    for check in checks:
        if check.kind == "inspec":
            try:
                found += await _inspec(check, bench)
            except (TotoError, OSError) as error:
                found.append(Control.broken(str(check), _words(error, str(check))))
    modules = [each for each in checks if each.kind == "testinfra"]
    if modules:
        found += await _testinfra(modules, bench)
    return bounded(found)


async def _inspec(check: Check, bench: Bench) -> list[Control]:
    """One profile's controls. Raises `TotoError`, OSError."""
    program = next((each for each in inspec.NAMES if shutil.which(each)), None)
    if program is None:
        raise inspec.CheckFailed(
            "neither inspec nor cinc-auditor is on toto's PATH",
            target=str(check),
            hint="install one of them where toto runs: cinc-auditor (cinc.sh) is free",
        )
    found = _whole(await tool(program))
    words: list[str | Pushed] = [door.ENTER, found.program, "exec", Pushed(INFRA / check.path), *door.OPTIONS]
    words += ["--reporter", f"json:{RESULTS}/report.json", "--no-color", "--no-create-lockfile"]
    for name, option in _FILES.items():
        if (bench.tree / check.path / name).is_file():
            words += [option, Pushed(INFRA / check.path / name)]
    if check.controls:
        words += ["--controls", *check.controls]
    env = {**bench.env, **found.env}
    if _LICENCE in os.environ:
        env[_LICENCE] = os.environ[_LICENCE]
    with _folders(bench) as (programs, results):
        door.write(programs, bench.env["PATH"])
        done = await run(
            words,
            cell=_cell(bench, found.read, programs, results, found.store),
            env=env,
            timeout=bench.timeout,
            check=False,
            on_line=bench.on_line,
            on_error_line=bench.on_line,
        )
        report = folders.read_regular(results, "report.json", most=_LARGEST)
    if done.status not in inspec.REPORTED or report is None:
        raise inspec.explained(str(check), done.stderr or done.stdout)
    return inspec.read(report, str(check), check.controls)


async def _testinfra(checks: Sequence[Check], bench: Bench) -> list[Control]:
    """The controls of all modules; what kept them from running is one more."""
    problem = ""
    with _folders(bench) as (programs, results):
        shutil.copyfile(testinfra.RUNNER, programs / "runner.py")
        words, read = testinfra.command(checks, bench.host, door.PLACE / "runner.py", RESULTS / "tests")
        try:
            done = await run(
                [*words[:-1], Pushed(words[-1])],
                cell=_cell(bench, read, programs, results),
                env=bench.env,
                cwd=INFRA,
                timeout=bench.timeout,
                check=False,
                on_line=bench.on_line,
                on_error_line=bench.on_line,
            )
            written = folders.read_regular(results, "tests", most=_LARGEST)
            if done.status not in testinfra.TOLD or written is None:
                problem = f"pytest ended with status {done.status}:\n{tail(done.stderr or done.stdout)}"
        except (TotoError, OSError) as error:
            problem = _words(error, "")
            written = folders.read_regular(results, "tests", most=_LARGEST)
    return testinfra.read((written or b"").decode(errors="replace"), checks, problem)


@contextmanager
def _folders(bench: Bench) -> Iterator[tuple[Path, Path]]:
    """A folder for what the cell runs, and one for what it writes."""
    with owned.folder("compliance", bench.scratch) as folder:
        folder.chmod(0o755)
        programs, results = folder / "programs", folder / "results"
        programs.mkdir(mode=0o755)
        results.mkdir(mode=0o700)
        yield programs, results


def _cell(bench: Bench, read: Mapping[Path, Path], programs: Path, results: Path, store: Sequence[str] = ()) -> Cell:
    cell = replace(
        bench.cell,
        read={**bench.cell.read, **read, door.PLACE: programs},
        write={RESULTS: results},
        store=store or bench.cell.store,
        limits=Limits(disk=_DISK, file_size=_DISK),
    )
    cell.give()
    return cell


def _whole(found: Tool) -> Tool:
    """InSpec's packages are whole folders of /opt, such as /opt/cinc-auditor: its cell sees those, where they are."""
    source = found.read.get(Path(found.program))
    if source is None or not source.is_relative_to(_OMNIBUS) or len(source.parts) < 4:
        return found
    package = Path(*source.parts[:3])
    rest = {place: each for place, each in found.read.items() if each != source}
    return Tool(str(source), {**rest, package: package}, found.store, found.env)


def _words(error: Exception, check: str) -> str:
    """An error as a control's message, without the name that the control has already."""
    if isinstance(error, CommandTimeout):
        return f"it did not end within {error.seconds:g} s, and was ended; see compliance.timeout in toto.toml"
    return str(error).removeprefix(f"{check}: ") or repr(error)
