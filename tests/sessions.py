"""A plugin of pytest: which tests share a process, which are slow, and how a session ends.

`pytest -n 2 --dist loadgroup --no-loadscope-reorder` (`make test`) gives a file to one process, and files that need the
same dear fixture to the same one: it is made once. The longest begin first, so that the processes end together.
Files that bind the same fixed addresses say so: `pytestmark = pytest.mark.xdist_group("127.0.1")`.
"""

import contextlib
import ctypes
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

DEAR: Final = ("cluster", "prefect_server")  # a session's fixtures that take many seconds to make
PATIENCE: Final = 90.0  # seconds that a process has for the ends of its fixtures
PR_SET_PDEATHSIG: Final = 1  # of prctl(2)

_processes: list[Any] = []  # of `pytest -n`: xdist's controllers of them, in the session that began them


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks; end on SIGTERM, and with the session that began us, as on Ctrl-C."""
    for mark in (
        "exhaustive: takes minutes, and is one more of a kind that others show; run with TOTO_CUTS=1",
        "lab: drives real nix, QEMU and ssh",
        "minutes(n): the tests of this file take about so long",
        "slow: needs a machine, a server or minutes; `make test-fast` leaves it out",
        "xdist_group(name): is run in the same process as all others of that name",
    ):
        config.addinivalue_line("markers", mark)
    # By way of SIGINT, which asyncio turns into a cancel of the test that runs. (A shell's `make test &` ignores it.)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if hasattr(config, "workerinput"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


@pytest.hookimpl(wrapper=True)  # before xdist looks at the groups, and before what `-m` names is chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Group what shares something, the longest group first, and mark what is slow."""
    files: dict[Path, list[pytest.Item]] = defaultdict(list)
    for item in items:
        files[item.path].append(item)
    groups: dict[Path, str] = {}
    minutes: dict[str, float] = defaultdict(float)
    for path, mine in files.items():
        said = mine[0].get_closest_marker("xdist_group")
        needed = {name for item in mine for name in getattr(item, "fixturenames", ())}
        groups[path] = said.args[0] if said else next((name for name in DEAR if name in needed), path.stem)
        minutes[groups[path]] += _minutes(mine[0])
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(groups[item.path]))
        if _minutes(item) or item.get_closest_marker("lab") or set(DEAR) & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("exhaustive") and not os.environ.get("TOTO_CUTS"):
            item.add_marker(pytest.mark.skip(reason="NOT TRIED, one more of its kind: TOTO_CUTS=1"))
    items.sort(key=lambda item: -minutes[groups[item.path]])
    yield


def _minutes(item: pytest.Item) -> float:
    said = item.get_closest_marker("minutes")
    return float(said.args[0]) if said else 0.0


@pytest.hookimpl(optionalhook=True)
def pytest_testnodeready(node: Any) -> None:
    """One of the processes of `pytest -n` is there."""
    _processes.append(node)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(exitstatus: int) -> None:
    """Let the processes of an interrupted `pytest -n` end in their own time: xdist kills them after ten seconds."""
    if exitstatus != pytest.ExitCode.INTERRUPTED:
        return
    for node in _processes:
        with contextlib.suppress(ProcessLookupError):
            node.gateway._io.popen.send_signal(signal.SIGINT)
    for node in _processes:
        with contextlib.suppress(Exception):
            node.channel.waitclose(PATIENCE)


def pytest_keyboard_interrupt() -> None:
    """From here on the fixtures end: a second signal must not keep them from it. (SIGQUIT and SIGKILL do.)"""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which children would inherit
