"""A person's own shell command: prefect-shell starts it, and its shell is a cell.

Of prefect-shell it is the start alone. Its output is read as it comes and kept nowhere, it is ended by SIGTERM and then
SIGKILL, and what it leaves running ends with it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prefect_shell import ShellOperation

from toto.base import process
from toto.base.process import Running
from toto.cell import shell
from toto.jobs.run import Command


@asynccontextmanager
async def started(command: Command) -> AsyncIterator[Running]:
    """A command that runs in its cell as long as the block lasts. Values reach it by its environment alone."""
    folder = shell.prepare(command.folder, command.cell, command.argv, command.cwd, command.script)
    operation = ShellOperation(
        commands=[command.text], shell=shell.PROGRAM, env={"PATH": str(folder)}, stream_output=False
    )
    async with operation:
        triggered = await operation.atrigger()
        # (By its own ways, prefect-shell would keep all output in memory, and go on waiting when SIGTERM is ignored.)
        begun = triggered._process._process
        async with process.adopted(command.argv, begun, command.cell) as running:
            yield running
