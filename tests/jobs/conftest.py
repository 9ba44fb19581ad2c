"""Jobs that are run without Prefect, in real cells."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tasks import shell
from toto.base import paths
from toto.jobs import folder
from toto.jobs.folder import Jobs
from toto.jobs.history import History, Run
from toto.jobs.run import Given, run


@dataclass
class Bench:
    """A tree of jobs and their history. Its jobs have no network, unless their `.conf` says so."""

    tree: Path
    history: History
    output: list[bytes] = field(default_factory=list)

    def write(self, files: Mapping[str, str]) -> None:
        """Write files of `jobs/`; a script is a shell's unless it begins with `#`, and executable."""
        for name, text in files.items():
            path = self.tree / "jobs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            script = path.suffix in (".run", ".before", ".after", ".init") or name in ("before", "after")
            path.write_text(f"#!/bin/sh\n{text}" if script and not text.startswith("#") else text)
            path.chmod(0o755)

    @property
    def jobs(self) -> Jobs:
        return folder.read(self.tree)

    def queue(self, job: str = "a", **parameters: str) -> Run:
        return self.history.queue(job, parameters=parameters)

    async def run(self, job: str = "a", begun: Run | None = None, **parameters: str) -> Run:
        """Run a job to its end."""
        begun = begun or self.queue(job, **parameters)
        jobs = self.jobs
        given = Given(self.tree, jobs.contexts_of(jobs.job(job))[0], shell=shell.started)
        return await run(jobs, jobs.job(job), begun, self.history, given, self.output.append)

    def log(self, of: Run) -> str:
        return self.history.log(of).read_text(errors="replace")

    def said(self, of: Run) -> list[str]:
        """The lines of the log that are the job's own."""
        return [line for line in self.log(of).splitlines() if not line.startswith("[toto] ")]


Make = Callable[[Mapping[str, str]], Bench]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a `Bench` with some files of `jobs/`."""
    monkeypatch.setenv(paths.STATE, str(tmp_path / "state"))
    tree = tmp_path / "tree"
    tree.mkdir(mode=0o755)

    def made(files: Mapping[str, str]) -> Bench:
        bench = Bench(tree, History(tmp_path / "infra.git"))
        bench.write({"a.conf": "NETWORK=none\n", **files})
        return bench

    return made
