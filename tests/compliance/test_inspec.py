"""What InSpec reported, as it was recorded of InSpec 5.22.95, in toto's words. A run of it is in test_run.py."""

from pathlib import Path

import pytest

from toto.compliance.inspec import CheckFailed, explained, read
from toto.compliance.results import Control, Outcome

RECORDED = Path(__file__).with_name("inspec")

BASE = [
    ("ok-1", "passed", 0.7, "", "file /etc/passwd"),
    ("fail-1", "failed", 1.0, "File /nope is expected to exist: expected File /nope to exist", "file /nope"),
    ("skip-1", "not checked", 0.3, "Skipped control due to only_if condition: never", ""),
    ("waived-1", "failed", 0.5, "File /nope2 is expected to exist: expected File /nope2 to exist", "file /nope2"),
    ("input-1", "passed", 0.5, "", "Numeric"),
    (
        "err-1",
        "failed",
        0.5,
        'Command: `sh -c "exit 3"` exit_status is expected to eq 0: expected: 0 got: 3 (compared using ==)',
        'Command: `sh -c "exit 3"`',
    ),
]
WAIVED = (
    "waived-1",
    "waived",
    0.5,
    "waived until 2030-01-01: later\nFile /nope2 is expected to exist: expected File /nope2 to exist",
    "file /nope2",
)
NOT_RUN = (
    "waived-1",
    "waived",
    0.5,
    "waived until 2030-01-01: later\nSkipped control due to waiver condition: later",
    "",
)
EXPIRED = (
    "waived-1",
    "failed",
    0.5,
    "its waiver (later) expired on 2020-01-01\nFile /nope2 is expected to exist: expected File /nope2 to exist",
    "file /nope2",
)
CASES = {
    "ok": [("x", "passed", 0.5, "", "file /")],
    "failed": BASE,
    "over-ssh": BASE,
    "two-profiles": [*BASE, ("x", "passed", 0.5, "", "file /")],
    "skipped-only": [("x", "not checked", 0.5, "Skipped control due to only_if condition.", "")],
    "unsupported-platform": [
        ("unsup", "not checked", 0.5, "Skipping profile: 'unsup' on unsupported platform: 'debian/12.11'.", "")
    ],
    "command-timeout": [
        (
            "x",
            "error",
            0.5,
            "Command: `sleep 300` exit_status: Command `sleep 300` timed out after 3 seconds",
            "Command: `sleep 300`",
        )
    ],
    "waivers": [WAIVED if each[0] == "waived-1" else each for each in BASE],
    "waiver-1": [WAIVED],
    "waiver-2": [NOT_RUN],
    "waiver-3": [EXPIRED],
    "waiver-4": [BASE[0], NOT_RUN],
}


def told(controls: list[Control]) -> list[tuple[str, str, float, str, str]]:
    return [(each.id, each.outcome.value, each.impact, each.message, each.resource) for each in controls]


@pytest.mark.parametrize("name", CASES)
def test_what_was_recorded_is_read(name: str) -> None:
    assert told(read((RECORDED / f"{name}.json").read_bytes(), "inspec/base")) == CASES[name]


def test_every_recorded_case_is_read_here() -> None:
    read_elsewhere = {"no-control-matches.json", *(f"stderr-{each}.txt" for each in SAID)}
    assert {each.name for each in RECORDED.iterdir()} - read_elsewhere == {f"{name}.json" for name in CASES}


def test_no_control_by_these_names_is_an_error() -> None:
    report = (RECORDED / "no-control-matches.json").read_bytes()
    with pytest.raises(CheckFailed, match="inspec/base: has no control ssh-1 or ssh-2\nnext: write the ids"):
        read(report, "inspec/base", ["ssh-1", "ssh-2"])
    with pytest.raises(CheckFailed, match="inspec/base: has no controls\n"):
        read(report, "inspec/base")


@pytest.mark.parametrize("report", ["", "{", "[]", "null", '{"profiles": 1}', '{"profiles": [{"controls": [1]}]}'])
def test_what_is_no_report_is_an_error(report: str) -> None:
    with pytest.raises(CheckFailed, match="inspec/base: its report cannot be read"):
        read(report.encode(), "inspec/base")


SAID = {
    "syntax": "bad/controls/a.rb:1: syntax error, unexpected end-of-input, expecting `end'\nnext: mend it",
    "missing": "InSpec finds no profile there, or not what it depends on\nnext: it needs an inspec.yml",
    "refused": "could not connect to the machine: Connection refused - connect(2) for 127.0.0.1:22622\nnext: does",
    "bad-key": "could not connect to the machine: Authentication failed for user root@127.0.0.1\nnext: does",
}


@pytest.mark.parametrize("name", SAID)
def test_what_keeps_it_from_running_is_told_apart(name: str) -> None:
    error = explained("inspec/base", (RECORDED / f"stderr-{name}.txt").read_text())
    assert SAID[name] in str(error) and str(error).startswith("inspec/base: ")


def test_a_resource_that_does_not_know_nixos_is_not_checked_and_one_that_works_is_named() -> None:
    skipped = (
        '{"status": "skipped", "code_desc": "Service nginx", "resource": "Service nginx", '
        '"skip_message": "The `service` resource is not supported on your OS yet."}'
    )
    passed = '{"status": "passed", "code_desc": "File / is expected to exist", "run_time": 0.5}'
    report = f'{{"profiles": [{{"controls": [{{"id": "x", "impact": 0.9, "results": [{passed}, {skipped}]}}]}}]}}'
    (control,) = read(report.encode(), "inspec/base")
    assert control.outcome is Outcome.NOT_CHECKED, "one that was skipped is never green, whatever else passed"
    assert control.message == "Service nginx: InSpec's `service` does not know this system; `systemd_service` works"


def test_a_waiver_of_what_passes_is_told() -> None:
    waiver = '"waiver_data": {"justification": "later", "expiration_date": null, "run": true}'
    report = f'{{"profiles": [{{"controls": [{{"id": "x", {waiver}, "results": [{{"status": "passed"}}]}}]}}]}}'
    (control,) = read(report.encode(), "inspec/base")
    assert (control.outcome, control.message) == (
        Outcome.PASSED,
        "it passes: its waiver (later) is not needed any more",
    )
