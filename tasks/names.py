"""Names of runs."""

from pathlib import Path

from prefect import runtime


def run_name() -> str:
    parameters = runtime.flow_run.parameters
    what = (parameters.get("commit") or "newest commit")[:8]
    return f"{Path(parameters['repo']).name.removesuffix('.git')} {what} ({parameters.get('origin', 'ui')})"


def repo_run_name() -> str:
    return Path(runtime.flow_run.parameters["repo"]).name.removesuffix(".git")
