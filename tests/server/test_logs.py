"""What counts as a fault in a log."""

import pytest

from toto.server import logs

RUN = "15:42:40.689 | ERROR   | Flow run 'web1: rehearse' - Finished in state Failed('1 test failed')\n"
QUIET = """\
15:42:40.689 | INFO    | prefect.flow_runs.worker - Worker 'toto@vm' submitting flow run
15:42:41.000 | WARNING | prefect.server.events.actions - Action failed: 'x'
toto: infra: started 1 pushes that had waited
2026-11-25 15:20:49.751 UTC [14805] LOG:  shutting down
"""


@pytest.mark.parametrize(
    "line",
    [
        "15:16:57.929 | ERROR   | prefect.server.utilities.messaging.memory - Failed in consume_loop",
        "ERROR:    Exception in ASGI application",
        'Traceback (most recent call last):\n  File "x", line 1\nValueError: y',
        'remote: Traceback (most recent call last):\nremote:   File "x", line 1',
        "Task exception was never retrieved\nfuture: <Task finished>",
        "/x.py:1: RuntimeWarning: coroutine '_too_large' was never awaited",
        "Exception ignored in: <coroutine object x>",
        "toto: error: infra.git: no space left on device",
        "2026-11-25 15:42:36.484 UTC [7397] ERROR:  invalid byte sequence for encoding",
        "2026-11-25 15:42:36.484 UTC [7397] FATAL:  the database system is starting up",
        "15:17:30.948 | WARNING | messaging - Message failed after 4 retries and will be moved to the dead letter "
        "queue",
        "15:17:30.948 | WARNING | x - (sqlite3.OperationalError) database is locked",
        RUN + "Traceback (most recent call last):\n  File \"x\", line 1\nKeyError: 'y'",
    ],
)
def test_error_is_found_among_other_lines(line: str) -> None:
    found = list(logs.faults(QUIET + line + "\n" + QUIET))
    assert len(found) == 1 and line.splitlines()[-1].removeprefix("remote: ") in found[0]


@pytest.mark.parametrize(
    "text",
    [
        QUIET,
        RUN,
        RUN + QUIET,
        "",
        "15:48:42.351 | ERROR   | prefect.engine - Crash detected! Execution was aborted by a termination signal.\n",
    ],
)
def test_other_lines_and_results_of_runs_are_no_faults(text: str) -> None:
    assert list(logs.faults(text)) == []


def test_every_known_error_has_its_reason() -> None:
    assert all(len(known.reason) > 20 for known in logs.KNOWN)
