"""Runs modules of pytest-testinfra in a cell, against the machine that `on-host` reaches.

    python -IS runner.py SITE RESULTS HOST '{"compliance/ssh.py": ["test_root_may_not_log_in"], …}'

It is a program of its own: of toto it has only `on-host`, and the packages in SITE. For each module it gets the names
of its tests that are run; all for none. It writes a line of JSON to RESULTS for each test as it ends:
`toto.compliance.testinfra` reads them.
"""

import json
import re
import subprocess
import sys
from typing import Any

SITE, RESULTS, HOST, WANTED = sys.argv[1:] if __name__ == "__main__" else ("", "", "", "{}")
sys.path.insert(0, SITE)
sys.dont_write_bytecode = True

import pytest  # noqa: E402
from testinfra import backend  # noqa: E402
from testinfra.backend.base import BaseBackend, CommandResult  # noqa: E402

LOST = 255
NO_COMMAND = (64, 69)  # `on-host` itself refuses: too long a command, or a machine that pulls


class OnHost(BaseBackend):
    """A backend of testinfra's that runs commands by `on-host`."""

    NAME = "on-host"

    def get_pytest_id(self) -> str:
        return self.NAME

    def run(self, command: str, *args: str, **_: Any) -> CommandResult:
        line = self.get_command(command, *args)
        done = subprocess.run(["on-host", line], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        said = done.stderr.decode(errors="replace").strip()
        if done.returncode == LOST or (done.returncode in NO_COMMAND and said.startswith("on-host: ")):
            raise ConnectionError(f"`{line[:200]}` got no answer from the machine: {said[-500:] or 'it says nothing'}")
        return self.result(done.returncode, line.encode(), done.stdout, done.stderr)


class Recorder:
    """A plugin of pytest's that writes down how each test ended."""

    def __init__(self, wanted: dict[str, list[str]]) -> None:
        self.wanted = wanted
        self.results = open(RESULTS, "w")  # noqa: SIM115, PTH123

    def say(self, **result: Any) -> None:
        print(json.dumps(result), file=self.results, flush=True)

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", "impact(value): how much a failure matters, from 0 to 1; 0.5 by default")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.say(module=_module(report.nodeid), broken=_last_words(str(report.longrepr)))

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [each for each in items if _chosen(each, self.wanted[_module(each.nodeid)])]
        left = [each for each in items if each not in kept]
        config.hook.pytest_deselected(items=left)
        for module, names in self.wanted.items():
            there = {_module(each.nodeid) for each in items}
            if module in there and not any(_module(each.nodeid) == module for each in kept):
                self.say(module=module, none=names)
        items[:] = kept
        for each in items:
            marked = each.get_closest_marker("impact")
            documented = getattr(getattr(each, "function", None), "__doc__", None) or ""
            each.user_properties += [
                ("impact", marked.args[0] if marked and marked.args else None),
                ("title", documented.strip().partition("\n")[0]),
            ]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        report.error = call.excinfo
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            outcome, message = _outcome(report)
            module, line, _ = report.location
            self.say(
                module=_module(report.nodeid),
                id=_name(report.nodeid),
                outcome=outcome,
                message=message,
                resource=f"{module}:{(line or 0) + 1}",
                seconds=report.duration,
                **dict(report.user_properties),
            )


def _outcome(report: Any) -> tuple[str, str]:
    """How a test ended, in toto's words, and why."""
    error = report.error
    said = error.exconly(tryshort=True) if error is not None else str(report.longrepr or "")
    if hasattr(report, "wasxfail"):
        reason = report.wasxfail.removeprefix("reason: ") or "no reason given"
        if report.passed:
            return "passed", f"it passes, though it is expected to fail: {reason}"
        return "waived", f"expected to fail: {reason}\n{said}"
    if report.passed:
        return "passed", ""
    if report.skipped:
        return "not checked", str(error.value) if error is not None else said
    return _failure(report, error, said)


def _failure(report: Any, error: Any, said: str) -> tuple[str, str]:
    if error is not None and error.errisinstance(NotImplementedError):
        return "not checked", (
            f"testinfra's `{error.traceback[-1].path.stem}` does not know this system; "
            "host.file('/run/current-system/sw/bin/…'), host.exists('…') or host.run('…') works"
        )
    if report.when != "call":
        return "error", f"in its {report.when}: {said}"
    failed = error is None or error.errisinstance((AssertionError, pytest.fail.Exception))
    return "failed" if failed else "error", said


def _chosen(item: pytest.Item, names: list[str]) -> bool:
    name = _name(item.nodeid)
    return not names or name in names or name.partition("[")[0] in names


def _module(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _name(nodeid: str) -> str:
    """A test's name, without the machine that testinfra puts into its parameters."""
    name = nodeid.partition("::")[2]
    return re.sub(r"\[(.*-)?on-host(-.*)?\]$", lambda found: _parameters(found[1], found[2]), name)


def _parameters(before: str | None, after: str | None) -> str:
    rest = "-".join(filter(None, ((before or "").removesuffix("-"), (after or "").removeprefix("-"))))
    return f"[{rest}]" if rest else ""


def _last_words(text: str) -> str:
    """The end of what pytest says of a module that it cannot read: the error, and where it is."""
    lines = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E ")]
    return "\n".join(lines[-4:]) or text[-1000:]


if __name__ == "__main__":
    backend.BACKENDS[OnHost.NAME] = f"{__name__}.{OnHost.__name__}"
    modules = json.loads(WANTED)
    arguments = [
        *(
            "-c",
            "/dev/null",
            "--rootdir=.",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
            "-p",
            "testinfra.plugin",
        ),
        *("--hosts", f"{OnHost.NAME}://{HOST}", "-q", "--color=no", *modules),
    ]
    sys.exit(pytest.main(arguments, plugins=[Recorder(modules)]))
