"""What a run tells, whole: its log, the plan, the report. An error that hosts have in common is told once."""

import re
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.reconcile import reconcile
from tests.conftest import PrefectServer
from tests.flows.test_kinds import logged
from tests.lab import nix_daemon
from tests.nix.test_evaluation import NIXOS
from tests.repos import InfraRepo

pytestmark = pytest.mark.skipif(not nix_daemon.possible(), reason="toto's nix daemon needs root or sudo")

MACHINES = "machines:\n" + "".join(f"  - {{name: web{number}, address: 192.0.2.{number}}}\n" for number in range(1, 5))
COMMON = """\
{ broken = { }.nope;
  fine = builtins.trace "warning: x is old,\\nreally" "fine"; }
"""
LOG = """\
the plan of COMMIT:
TARGET        ACTION  WHY                WHAT CHANGES
machine/web1  none    manifest           added, at 192.0.2.1
machine/web2  none    manifest           added, at 192.0.2.2
machine/web3  none    manifest           added, at 192.0.2.3
machine/web4  none    manifest           added, at 192.0.2.4
host/web1     none    does not evaluate  common.nix:1
host/web2     none    does not evaluate  common.nix:1
host/web3     none    does not evaluate  common.nix:1
host/web4     none    does not evaluate  its VM does not evaluate (hosts/web4.nix)
warning: x is old,
  really (web4)
web1, web2, web3: evaluation failed: does not evaluate (common.nix:1):
error: attribute 'nope' missing

       at common.nix:1:12:

            1| { broken = { }.nope;
             |            ^
            2|   fine = builtins.trace "warning: x is old,\\nreally" "fine"; }
next: fix common.nix:1 and push again
web4: evaluation failed: its VM does not evaluate (hosts/web4.nix):
error: attribute 'vm' missing

       at toto's nix/evaluate.nix:LINE:
next: replace what only the real machine has in `virtualisation.vmVariant` of hosts/web4.nix: the machine's own system evaluates
COMMIT: web1, web2, web3: evaluation failed: does not evaluate (common.nix:1) (and 1 more); nothing was touched
Finished in state Failed
"""  # noqa: E501
ERRORS = """\
## web1, web2, web3: evaluation failed

**Next:** fix common.nix:1 and push again

```text
does not evaluate (common.nix:1):
error: attribute 'nope' missing

       at common.nix:1:12:

            1| { broken = { }.nope;
             |            ^
            2|   fine = builtins.trace "warning: x is old,\\nreally" "fine"; }
```

## web4: evaluation failed

**Next:** replace what only the real machine has in \\`virtualisation.vmVariant\\` of hosts/web4.nix: the machine's own system evaluates

```text
its VM does not evaluate (hosts/web4.nix):
error: attribute 'vm' missing

       at toto's nix/evaluate.nix:LINE:
```"""  # noqa: E501
PLAN = f"""\
| target | action | why | what changes |
| --- | --- | --- | --- |
| machine/web1 | none | manifest | added, at 192.0.2.1 |
| machine/web2 | none | manifest | added, at 192.0.2.2 |
| machine/web3 | none | manifest | added, at 192.0.2.3 |
| machine/web4 | none | manifest | added, at 192.0.2.4 |
| host/web1 | none | does not evaluate | common.nix:1 |
| host/web2 | none | does not evaluate | common.nix:1 |
| host/web3 | none | does not evaluate | common.nix:1 |
| host/web4 | none | does not evaluate | its VM does not evaluate (hosts/web4.nix) |

⚠ warning: x is old,
  really (web4)

{ERRORS}"""
REPORT = f"""\
# 🔴 COMMIT failed: nothing was touched

{ERRORS}

## Targets

| target | result | more |
| --- | --- | --- |
| web1 | evaluation failed |  |
| web2 | evaluation failed |  |
| web3 | evaluation failed |  |
| web4 | evaluation failed |  |"""


async def test_hosts_that_do_not_evaluate_are_told_once_with_their_names(
    prefect_server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nixpkgs/nixos").mkdir(parents=True)
    (tmp_path / "nixpkgs/nixos/default.nix").write_text(NIXOS)
    monkeypatch.setenv("NIX_PATH", f"nixpkgs={tmp_path / 'nixpkgs'}")
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    repo, api = InfraRepo(tmp_path / "repo"), prefect_server.api
    hosts: dict[str, str | None] = {
        f"hosts/web{number}.nix": "{ said = (import ../common.nix).%s; }" % ("fine" if number == 4 else "broken")
        for number in range(1, 5)
    }
    commit = repo.commit({"machines.yaml": MACHINES, "common.nix": COMMON, **hosts})
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_HOME: tmp_path / "prefect"}):
        state: Any = await reconcile(repo.bare, plan_only=True, return_state=True)

    def told(text: str) -> str:
        own = r"(evaluate\.nix):\d+:\d+:\n(\n( +\d*\|.*\n)+)?"  # its lines are toto's own matter
        return re.sub(own, r"\1:LINE:\n", text.replace(commit[:8], "COMMIT"))

    run = str(state.state_details.flow_run_id)
    await logged(prefect_server, run, "Finished in state")
    below = await api.call("POST", "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}})
    runs = [run, *(each["id"] for each in below)]
    found = {"logs": {"flow_run_id": {"any_": runs}, "task_run_id": {"is_null_": True}}, "sort": "TIMESTAMP_ASC"}
    lines = await api.call("POST", "/logs/filter", found)
    assert told("".join(f"{line['message']}\n" for line in lines)) == LOG
    assert told(state.message) == LOG.splitlines()[-2]
    written = await api.call("POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": runs}}})
    pages = {each["key"]: told(each["data"]) for each in written}
    assert pages["plan-infra"] == PLAN
    assert pages["report-infra"] == REPORT
