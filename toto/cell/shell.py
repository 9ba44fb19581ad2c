"""A cell as the shell of prefect-shell, which starts a program with the name of a file that holds a person's command.

prefect-shell takes the program's name in small letters, so that a path may not do: here it is a name for PATH.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toto.base import files
from toto.cell.cell import Cell

PROGRAM: Final = "toto-cell"
_LAUNCHER: Final = Path(__file__).with_name("launcher.py")


def prepare(folder: Path, cell: Cell, argv: Sequence[str], cwd: Path, script: Path) -> Path:
    """Write the program `PROGRAM` into a new folder, which only toto may enter; return the folder, for PATH.

    It runs `argv` in the cell, in its folder `cwd`, after it has copied the file that it is given to `script`.
    """
    folder.mkdir(mode=0o700)
    said = {"script": str(script), "argv": cell.command(argv, str(cwd)), "environment": cell.environment({})}
    prepared = files.write(folder / "prepared.json", json.dumps(said))
    words = shlex.join([sys.executable, "-I", "-S", str(_LAUNCHER), str(prepared)])
    files.write(folder / PROGRAM, f'#!/bin/sh\nexec {words} "$1"\n', 0o700)
    return folder
