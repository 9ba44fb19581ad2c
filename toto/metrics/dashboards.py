"""Grafana's dashboards of toto: `python3 toto/metrics/dashboards.py FOLDER` writes a JSON file for each.

It needs nothing but Python: nix/monitoring.nix calls it where there is no toto. Every query has an answer from a real
Prometheus in the tests (tests/metrics/test_prometheus.py), and the whole is of the types of `@grafana/schema`.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

_COLUMNS: Final = 24  # of Grafana's grid
_SOURCE: Final = {"type": "prometheus", "uid": "${source}"}
_REPO: Final = 'repo=~"$repo"'
_HOST: Final = f'{_REPO}, machine="$machine"'
_TARGET: Final = f'{_REPO}, kind="host", target="$machine"'
_DISKS: Final = 'fstype!~"tmpfs|ramfs|squashfs|overlay|iso9660"'


def _panel(kind: str, title: str, queries: dict[str, str], unit: str = "short", width: int = 12) -> dict[str, Any]:
    """A panel; `queries` are by what they are called in the legend. Tables and single numbers show the present."""
    now = kind != "timeseries"
    return {
        "type": kind,
        "title": title,
        "datasource": _SOURCE,
        "gridPos": {"w": width, "h": 5 if kind == "stat" else 8, "x": 0, "y": 0},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "expr": query,
                "legendFormat": legend,
                "instant": now,
                "format": "table" if kind == "table" else "time_series",
            }
            for number, (legend, query) in enumerate(queries.items())
        ],
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "options": {},
    }


def _variable(name: str, query: str, several: bool) -> dict[str, Any]:
    return {
        "type": "query",
        "name": name,
        "datasource": _SOURCE,
        "query": query,
        "refresh": 2,
        "includeAll": several,
        "multi": several,
        **({"allValue": ".*", "current": {"text": "All", "value": "$__all"}} if several else {}),
    }


def _dashboard(name: str, title: str, panels: Iterable[dict[str, Any]], *variables: dict[str, Any]) -> dict[str, Any]:
    """A dashboard, its panels in rows from left to right."""
    placed, x, y, height = [], 0, 0, 0
    for number, panel in enumerate(panels, 1):
        grid = panel["gridPos"]
        if x + grid["w"] > _COLUMNS:
            x, y, height = 0, y + height, 0
        placed.append({**panel, "id": number, "gridPos": {**grid, "x": x, "y": y}})
        x, height = x + grid["w"], max(height, grid["h"])
    source = {"type": "datasource", "name": "source", "query": "prometheus"}
    repo = _variable("repo", "label_values(toto_pushes_waiting, repo)", several=True)
    return {
        "uid": f"toto-{name}",
        "title": title,
        "tags": ["toto"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "1m",
        "time": {"from": "now-24h", "to": "now"},
        "timezone": "browser",
        "links": [
            {"type": "dashboards", "tags": ["toto"], "title": "toto", "icon": "", "tooltip": "", "keepTime": True}
            | {"asDropdown": False, "includeVars": True, "targetBlank": False}
        ],
        "templating": {"list": [source, repo, *variables]},
        "panels": placed,
    }


def _quantile(what: str, by: str, of: float = 0.95) -> str:
    return f"histogram_quantile({of}, sum by (le, {by}) (rate({what}_bucket[$__rate_interval])))"


def _said(what: str, selector: str) -> str:
    """What agents say, by toto or by their own metrics, once for each machine."""
    return f'max by (repo, machine) ({{__name__=~"toto_agent_{what}|flying_monkey_{what}", {selector}}})'


def dashboards() -> dict[str, dict[str, Any]]:
    """The dashboards, by the names of their files."""
    return {
        "fleet": _dashboard(
            "fleet",
            "toto: fleet",
            [
                _panel("stat", "Targets", {"{{state}}": f"count by (state) (toto_target_state{{{_REPO}}})"}),
                _panel("stat", "Alerts", {"firing": 'count(ALERTS{alertstate="firing"}) or vector(0)'}, width=4),
                _panel("stat", "Worker", {"up": "toto_worker_up"}, "bool_on_off", 4),
                _panel("stat", "Backup", {"age": "time() - toto_backup_timestamp_seconds"}, "s", 4),
                _panel("table", "State", {"": f"toto_target_state{{{_REPO}}}"}),
                _panel("table", "Deployed", {"": f"toto_target_info{{{_REPO}}}"}),
                _panel("table", "Age", {"": f"time() - toto_target_good_timestamp_seconds{{{_REPO}}}"}, "s"),
                _panel(
                    "table",
                    "Being changed since",
                    {"": f"time() - toto_target_intent_timestamp_seconds{{{_REPO}}}"},
                    "s",
                ),
                _panel(
                    "timeseries",
                    "Since the agents' last contact",
                    {"{{machine}}": f"time() - toto_agent_contact_timestamp_seconds{{{_REPO}}}"},
                    "s",
                ),
                _panel("table", "Reboot needed", {"": _said("reboot_needed", _REPO)}, "bool_yes_no", 6),
                _panel("table", "Drift", {"": _said("drift", _REPO)}, "bool_yes_no", 6),
                _panel(
                    "timeseries",
                    "Asked of the cache, per second",
                    {"{{result}}": f"sum by (result) (rate(toto_cache_requests_total{{{_REPO}}}[$__rate_interval]))"},
                ),
                _panel(
                    "timeseries",
                    "Sent by the cache",
                    {"{{machine}}": f"rate(toto_cache_sent_bytes_total{{{_REPO}}}[$__rate_interval])"},
                    "Bps",
                ),
                _panel(
                    "timeseries",
                    "Free on the fullest disk",
                    {
                        "{{machine}}": f"min by (machine) (node_filesystem_avail_bytes{{{_REPO}, {_DISKS}}} "
                        f"/ node_filesystem_size_bytes{{{_REPO}, {_DISKS}}})"
                    },
                    "percentunit",
                ),
                _panel(
                    "timeseries",
                    "Documents are valid for",
                    {"{{machine}}": f"toto_document_expiry_timestamp_seconds{{{_REPO}}} - time()"},
                    "s",
                ),
            ],
        ),
        "host": _dashboard(
            "host",
            "toto: one host",
            [
                _panel("stat", "State", {"{{state}}": f"toto_target_state{{{_TARGET}}}"}, width=6),
                _panel("stat", "Age", {"age": f"time() - toto_target_good_timestamp_seconds{{{_TARGET}}}"}, "s", 6),
                _panel("stat", "Failed units", {"units": f"flying_monkey_failed_units{{{_HOST}}}"}, width=6),
                _panel(
                    "stat", "Agent", {"contact": f"time() - flying_monkey_contact_timestamp_seconds{{{_HOST}}}"}, "s", 6
                ),
                _panel("table", "System", {"": f"flying_monkey_system_info{{{_HOST}}}"}),
                _panel("table", "Newest update", {"": f"flying_monkey_step_info{{{_HOST}}}"}, width=6),
                _panel("table", "Hooks and checks", {"": f"flying_monkey_hook_failed{{{_HOST}}}"}, "bool", 6),
                _panel("timeseries", "Steps", {"{{step}}": f"flying_monkey_step_duration_seconds{{{_HOST}}}"}, "s", 12),
                _panel(
                    "timeseries", "Evaluation", {"seconds": f'toto_evaluation_seconds{{{_REPO}, host="$machine"}}'}, "s"
                ),
                _panel("timeseries", "Load", {"one minute": f"node_load1{{{_HOST}}}"}),
                _panel("timeseries", "Memory", {"available": f"node_memory_MemAvailable_bytes{{{_HOST}}}"}, "bytes"),
                _panel(
                    "timeseries",
                    "Disks",
                    {"{{mountpoint}}": f"node_filesystem_avail_bytes{{{_HOST}, {_DISKS}}}"},
                    "bytes",
                ),
            ],
            _variable("machine", 'label_values(toto_target_state{repo=~"$repo", kind="host"}, target)', several=False),
        ),
        "runs": _dashboard(
            "runs",
            "toto: runs",
            [
                _panel(
                    "timeseries",
                    "Ended",
                    {"{{action}} {{result}}": f"sum by (action, result) (increase(toto_runs_total{{{_REPO}}}[1h]))"},
                ),
                _panel("timeseries", "Under way", {"{{state}}": "toto_runs_now"}),
                _panel("table", "The newest has failed", {"": f"toto_run_last_failed{{{_REPO}}}"}, "bool_yes_no"),
                _panel(
                    "table", "Since the newest", {"": f"time() - toto_run_last_end_timestamp_seconds{{{_REPO}}}"}, "s"
                ),
                _panel(
                    "timeseries", "Runs (95 %)", {"{{action}}": _quantile("toto_run_duration_seconds", "action")}, "s"
                ),
                _panel(
                    "timeseries", "Phases (95 %)", {"{{phase}}": _quantile("toto_phase_duration_seconds", "phase")}, "s"
                ),
                _panel("timeseries", "Oldest run that waits", {"waits": "toto_queue_seconds"}, "s", 8),
                _panel("timeseries", "Pushes without a run", {"{{repo}}": f"toto_pushes_waiting{{{_REPO}}}"}, width=8),
                _panel(
                    "timeseries",
                    "Sandboxes",
                    {"running": "toto_sandboxes_running", "at most": "toto_sandboxes_limit"},
                    width=8,
                ),
            ],
        ),
        "evaluation": _dashboard(
            "evaluation",
            "toto: evaluation",
            [
                _panel("timeseries", "Longest", {"{{host}}": f"topk(10, toto_evaluation_seconds{{{_REPO}}})"}, "s"),
                _panel(
                    "timeseries", "Largest", {"{{host}}": f"topk(10, toto_evaluation_memory_bytes{{{_REPO}}})"}, "bytes"
                ),
                _panel("table", "Seconds", {"": f"toto_evaluation_seconds{{{_REPO}}}"}, "s"),
                _panel("table", "Memory", {"": f"toto_evaluation_memory_bytes{{{_REPO}}}"}, "bytes"),
                _panel(
                    "timeseries",
                    "One host (50 %, 95 %)",
                    {
                        f"{of:g}": _quantile("toto_phase_duration_seconds", "phase", of).replace(
                            "_bucket[", '_bucket{phase="evaluate"}['
                        )
                        for of in (0.5, 0.95)
                    },
                    "s",
                    _COLUMNS,
                ),
            ],
        ),
        "jobs": _dashboard(
            "jobs",
            "toto: jobs",
            [
                _panel(
                    "timeseries",
                    "Ended",
                    {
                        "{{name}} {{result}}": "sum by (name, result) "
                        f"(increase(toto_job_runs_total{{{_REPO}}}[1h])) > 0"
                    },
                ),
                _panel(
                    "timeseries", "The newest took", {"{{name}}": f"toto_job_last_duration_seconds{{{_REPO}}}"}, "s"
                ),
                _panel("table", "The newest did not succeed", {"": f"toto_job_last_failed{{{_REPO}}}"}, "bool_yes_no"),
                _panel(
                    "table", "Since the newest", {"": f"time() - toto_job_last_end_timestamp_seconds{{{_REPO}}}"}, "s"
                ),
            ],
        ),
        "compliance": _dashboard(
            "compliance",
            "toto: compliance",
            [
                _panel(
                    "timeseries", "Controls", {"{{outcome}}": f"sum by (outcome) (toto_compliance_controls{{{_REPO}}})"}
                ),
                _panel(
                    "timeseries",
                    "What failed, broke or was not checked",
                    {
                        "{{machine}} {{outcome}}": f"toto_compliance_controls{{{_REPO}, "
                        'outcome=~"failed|error|not checked"} > 0'
                    },
                ),
                _panel("table", "Worst impact of what failed", {"": f"toto_compliance_failed_impact{{{_REPO}}}"}),
                _panel("table", "Checked", {"": f"time() - toto_compliance_timestamp_seconds{{{_REPO}}}"}, "s"),
            ],
        ),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in dashboards().items():
        (folder / f"{file}.json").write_text(json.dumps(content, indent=1) + "\n")
