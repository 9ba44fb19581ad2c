"""Running test scripts one by one, and judging their output."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from toto.base.bounded import Bounded
from toto.base.errors import TotoError
from toto.base.process import CommandNotFound, CommandTimeout, LineSink, Pushed, run
from toto.cell.cell import INFRA
from toto.rehearsal import tap
from toto.rehearsal.phase_run import Bench
from toto.rehearsal.results import PhaseResult, ScriptResult
from toto.rehearsal.suite import Phase, Script, Suite, shown

OUTPUT: Final = 1_000_000  # bytes of a script's output that are kept by default


async def run_script(
    script: Script,
    bench: Bench,
    *,
    tree: Path,
    timeout: float | None = None,
    keep: int = OUTPUT,
    on_line: LineSink | None = None,
) -> ScriptResult:
    """Run a script to its end in the cell of `bench`, in its own directory of the commit that is exported at `tree`.

    `timeout` is in seconds. `keep` bytes of the output are kept, and all of it is judged. `on_line` gets each line of
    stdout and stderr. The result has all errors of the script; only a cancel raises.
    """
    began = time.monotonic()
    judge, output = tap.Judge(), Bounded(keep)

    def hear(line: str) -> None:
        output.add(f"{line}\n".encode(errors="replace"))
        if on_line is not None:
            on_line(line)

    def hear_tap(line: str) -> None:
        judge.line(line)
        hear(line)

    status: int | None = None
    problem = _unable(script.path)
    if not problem:
        try:
            place = INFRA / script.path.relative_to(tree)
            completed = await run(
                [Pushed(place)],
                cell=bench.cell,
                env=bench.env,
                cwd=place.parent,
                timeout=timeout,
                check=False,
                keep=4096,
                on_line=hear_tap,
                on_error_line=hear,
            )
            status = completed.status
        except CommandTimeout:
            problem = f"it did not end within {timeout:g} s and was ended"
        except CommandNotFound:
            problem = "its interpreter is not in its cell: use one of /usr or of the nix store"
        except TotoError as error:  # it used more than its cell allows
            problem = error.message
        except (OSError, ValueError) as error:
            problem = f"it could not be started: {getattr(error, 'strerror', None) or error}"
    return ScriptResult(script, judge.report(status), time.monotonic() - began, output.text(), problem)


def _unable(path: Path) -> str:
    """Why the kernel cannot run a file, with its shebang; "" when it can."""
    try:
        with path.open("rb") as file:
            first = file.readline(256)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if not os.access(path, os.X_OK) or first.startswith(b"\x7fELF"):
        return "" if os.access(path, os.X_OK) else "it is gone, or not executable"
    if not first.startswith(b"#!"):
        return "its first line names no interpreter: begin it with `#!/bin/sh` or `#!/usr/bin/env bash`"
    shebang = shown(first.rstrip(b"\n").rstrip(b"\r"))
    interpreter = first[2:].rstrip(b"\n").split()
    if first.rstrip(b"\n").endswith(b"\r"):
        return f"its first line, `{shebang}`, ends like a DOS file's (CR LF): save it with plain line ends"
    if not interpreter or not os.access(interpreter[0], os.X_OK):
        return f"its first line, `{shebang}`, names an interpreter that is not here; `#!/usr/bin/env …` looks on PATH"
    return ""


async def run_phase(
    suite: Suite,
    phase: Phase,
    bench: Bench,
    *,
    tree: Path,
    timeout: float | None = None,
    keep: int = OUTPUT,
    on_line: LineSink | None = None,
    on_result: Callable[[ScriptResult], None] | None = None,
) -> PhaseResult:
    """Run the scripts of a phase one after the other, each for up to `timeout` seconds. A failure stops none.

    `tree`, `keep` and `on_line` are as in `run_script`; `on_result` gets each result.
    """
    results = []
    for script in suite.of(phase):
        result = await run_script(script, bench, tree=tree, timeout=timeout, keep=keep, on_line=on_line)
        results.append(result)
        if on_result is not None:
            on_result(result)
    return PhaseResult(suite.host, phase, tuple(results))
