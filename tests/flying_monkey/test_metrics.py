"""What Prometheus is told, as promtool reads it where there is one."""

import os
import shutil
import subprocess
import urllib.request
from dataclasses import replace
from pathlib import Path

from flying_monkey import metrics
from flying_monkey.machine import Configuration
from tests.conftest import free_port

STATE = {
    "current": 7,
    "desired": 8,
    "running": "/nix/store/a-system",
    "boots": "/nix/store/a-system",
    "wanted": "/nix/store/b-system",
    "contact": 1_800_000_000.5,
    "waiting": 2,
    "step": "tried",
    "state": "done 4",
    "error": "",
    "durations": {"fetched": 3.25, "tried": 7.5},
    "reboot_needed": True,
    "drift": "",
    "failed_units": ["a.service", "b.service"],
    "hooks": {"drain": "", 'odd"\\\nname': "exited with status 1"},
    "checks": {"web": ""},
}


def test_a_state_is_written_as_metrics() -> None:
    text = metrics.text(STATE)
    for line in (
        'flying_monkey_system_info{kind="desired",path="/nix/store/b-system"} 1',
        'flying_monkey_serial{kind="current"} 7',
        "flying_monkey_failed 1",
        'flying_monkey_step_duration_seconds{step="fetched"} 3.25',
        "flying_monkey_reboot_needed 1",
        "flying_monkey_drift 0",
        "flying_monkey_failed_units 2",
        'flying_monkey_hook_failed{kind="hooks",name="drain"} 0',
        'flying_monkey_hook_failed{kind="hooks",name="odd\\"\\\\ name"} 1',
    ):
        assert line in text.splitlines(), text
    assert metrics.text({}).splitlines()[-1] == "flying_monkey_up 1"
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "metrics"], input=text.encode(), check=True)


def test_a_time_keeps_its_seconds() -> None:
    assert "flying_monkey_contact_timestamp_seconds 1800000000.5" in metrics.text(STATE).splitlines()
    assert 'flying_monkey_serial{kind="current"} 1795651200' in metrics.text({"current": 1_795_651_200}).splitlines()


def test_the_file_is_for_everybody_and_is_served_on_loopback(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    file = tmp_path / "flying-monkey.prom"
    metrics.write(file, STATE)
    assert file.stat().st_mode & 0o777 == 0o644 and [*tmp_path.iterdir()] == [file]
    configuration = replace(Configuration("infra", "web1", ""), metrics=str(file), metrics_port=free_port())
    kept = metrics.serve(configuration, None)
    try:
        for _ in range(2):
            with urllib.request.urlopen(f"http://127.0.0.1:{configuration.metrics_port}/metrics", timeout=5) as got:
                assert got.read() == file.read_bytes()
    finally:
        os.close(kept)
        os.wait()
