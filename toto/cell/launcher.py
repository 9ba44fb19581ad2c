"""Becomes a command in its cell: `launcher.py PREPARED SCRIPT`. `toto.cell.shell` prepares it.

It copies SCRIPT to where the cell sees it. PREPARED is a JSON file with that place, the command line and the whole
environment: what started this program may have had more in its own. This file runs by itself, with the standard library
alone.
"""

import json
import os
import shutil
import sys
from pathlib import Path


def main() -> None:
    prepared, script = sys.argv[1:]
    said = json.loads(Path(prepared).read_text())
    shutil.copyfile(script, said["script"])
    Path(said["script"]).chmod(0o444)
    os.dup2(1, 2)  # one stream, so that lines stay in order
    os.chdir("/")
    os.execve(said["argv"][0], said["argv"], said["environment"])  # noqa: S606


if __name__ == "__main__":
    main()
