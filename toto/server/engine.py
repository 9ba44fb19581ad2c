"""What the worker starts for a flow run: Prefect's engine, on a flow that toto registered, and on no other.

Whoever may write to the API could give a deployment a different entrypoint, or a pull step that is a shell command.
Here the run's deployment must be as prefect.yaml in `root` says, or a job's, without pull steps; and the flow that runs
is the one that was found then, whatever the deployment says by the time the engine reads it.
"""

import contextlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":  # by its path, in whatever folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from toto.base.prefect_api import Api, ServerError
from toto.jobs import registered


class NotRegistered(Exception):
    """A run that toto does not start; the message says why."""


def entrypoint(deployment: dict[str, Any] | None, root: Path) -> str:
    """The entrypoint of a deployment as toto registered it. Raises `NotRegistered` when it is not so any more."""
    if deployment is None:
        raise NotRegistered("the run has no deployment")
    listed = yaml.safe_load((root / "prefect.yaml").read_text())["deployments"]
    known = {each["entrypoint"] for each in listed if each["name"] == deployment["name"]} | {registered.ENTRYPOINT}
    if deployment["entrypoint"] not in known:
        raise NotRegistered(f"the entrypoint of deployment {deployment['name']!r} is not the one that toto registered")
    if deployment["pull_steps"] or deployment["storage_document_id"]:
        raise NotRegistered(f"deployment {deployment['name']!r} has pull steps or a storage, and toto registered none")
    return str(deployment["entrypoint"])


def main(root: Path) -> None:
    """Run the flow run that the environment names, as `python -m prefect.engine` does."""
    api, run = Api.of(os.environ), os.environ["PREFECT__FLOW_RUN_ID"]
    try:
        found = api.ask("GET", f"/flow_runs/{run}")
        deployment = found["deployment_id"] and api.ask("GET", f"/deployments/{found['deployment_id']}")
        os.environ["PREFECT__FLOW_ENTRYPOINT"] = entrypoint(deployment, root)
    except (NotRegistered, ServerError) as error:
        next_step = "" if isinstance(error, ServerError) else "; start toto again: it registers its deployments anew"
        message = f"toto does not start it: {error}{next_step}"
        state = {"type": "CRASHED", "name": "Refused", "message": message}
        with contextlib.suppress(ServerError):
            api.ask("POST", f"/flow_runs/{run}/set_state", {"state": state, "force": True})
        sys.exit(f"toto: run {run}: {message}")
    os.chdir(root)
    sys.path.insert(0, str(root))
    sys.argv = ["prefect.engine"]
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
