"""The test scripts of a host: finding them, their digest, running them, and telling what came of it.

A script is an executable that prints TAP; `toto.tap` judges what it printed. A test that fails is a result,
never an exception. Not for the machine that is tested: the caller brings it within reach, through the environment.

`tests/lib/` is the place of what the scripts of several hosts share.
"""

import difflib
import hashlib
import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from toto import tap
from toto.errors import InputError
from toto.manifest import check_name
from toto.process import CommandNotFound, CommandTimeout, LineSink, run, shorten

OUTPUT: Final = 1_000_000  # bytes of a script's output that are kept, unless told
ON_HOST: Final = """\
#!/bin/sh
# on-host WORD...: run a command on the machine under test; the words arrive there as they are here.
# on-host 'LINE': a single argument is a line for the machine's shell.
if [ $# -eq 0 ]; then
    echo 'usage: on-host COMMAND [ARGUMENT...]' >&2
    exit 64
fi
if [ $# -eq 1 ]; then
    line=$1
else
    line=
    for word do
        line="$line '"
        while :; do
            case $word in
                *\\'*) line="$line${word%%\\'*}'\\\\''" word=${word#*\\'} ;;
                *) break ;;
            esac
        done
        line="$line$word'"
    done
fi
exec ssh -F "$TOTO_SSH_CONFIG" -o BatchMode=yes -- "$TOTO_HOST" "$line"
"""

_XML_ILLEGAL: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Phase(StrEnum):
    """When a script runs: in the sandbox without and with internet, on the machine before and after the switch."""

    NO_INTERNET = "no-internet"
    WITH_INTERNET = "with-internet"
    SMOKE = "smoke"
    POST_SWITCH = "post-switch"


@dataclass(frozen=True)
class Script:
    """A test script. `name` is its path within its host's tests, for people; `path` is where it is."""

    phase: Phase
    name: str
    path: Path


@dataclass(frozen=True)
class Suite:
    """The scripts of a host, sorted by phase and name; none for a host without tests."""

    host: str
    scripts: tuple[Script, ...] = ()
    _files: tuple[tuple[str, bytes, Path], ...] = field(default=(), repr=False)  # phase or "", name, where

    def of(self, phase: Phase) -> tuple[Script, ...]:
        """The scripts of a phase."""
        return tuple(script for script in self.scripts if script.phase == phase)

    def digest(self, phases: Iterable[Phase] = tuple(Phase)) -> str:
        """What the scripts of `phases` and their helpers are: the SHA-256 of phase, name, mode and content of each."""
        wanted = {"", *phases}
        total = hashlib.sha256()
        for phase, name, path in self._files:
            if phase in wanted:
                try:
                    content = path.read_bytes()
                    runnable = _runnable(path)
                except OSError as error:
                    raise InputError(f"cannot be read: {error.strerror}", target=_shown(name)) from None
                for part in (phase.encode(), name, b"x" if runnable else b"-", content):
                    total.update(b"%d:" % len(part))
                    total.update(part)
        return total.hexdigest()


def find(tree: Path, host: str) -> Suite:
    """The tests of `host` in the infra repo checked out at `tree`.

    Executables of `tests/HOST/PHASE/` (or `test/HOST/PHASE/`), and beside the host file `HOST-test.sh` (no-internet)
    and `HOST-smoke-test.sh` (smoke). README*, *.md, dotfiles and subdirectories are no scripts.
    Raises `InputError` for a script that is not executable, a link that leads out of the tree, or a directory
    whose name is almost a phase's.
    """
    try:
        check_name(host)
    except ValueError as error:
        raise InputError(f"a host's name {error}") from None
    tree = tree.resolve()
    scripts: list[Script] = []
    files: list[tuple[str, bytes, Path]] = []
    for root in (tree / "tests" / host, tree / "test" / host):
        for entry in _entries(tree, root):
            phase = _phase(tree, entry)
            if phase is None:
                files += [("", *each) for each in _walk(tree, entry) if not _document(entry)]
                continue
            for file in _entries(tree, entry):
                if _document(file):
                    continue
                files += [(phase.value, *each) for each in _walk(tree, file)]
                if not file.name.startswith(".") and not file.is_dir():
                    scripts.append(_script(tree, phase, file, f"{phase}/{_shown(os.fsencode(file.name))}"))
    for file, phase in _beside(tree, host):
        if os.path.lexists(file):
            files += [(phase.value, *each) for each in _walk(tree, file)]
            scripts.append(_script(tree, phase, file, file.name))
    if scripts:
        files += [("", *each) for each in _walk(tree, tree / "tests" / "lib")]
    order = list(Phase)
    return Suite(host, tuple(sorted(scripts, key=lambda each: (order.index(each.phase), each.name, each.path))),
                 tuple(sorted(files, key=lambda each: each[:2])))


def _beside(tree: Path, host: str) -> Iterator[tuple[Path, Phase]]:
    hosts = tree / "hosts"
    for folder in (hosts, hosts / host):
        yield folder / f"{host}-test.sh", Phase.NO_INTERNET
        # With a host `web` and a host `web-smoke`, `web-smoke-test.sh` is the latter's.
        if not (hosts / f"{host}-smoke.nix").exists() and not (hosts / f"{host}-smoke").is_dir():
            yield folder / f"{host}-smoke-test.sh", Phase.SMOKE


def _phase(tree: Path, entry: Path) -> Phase | None:
    if not entry.is_dir():
        return None
    names = [phase.value for phase in Phase]
    if entry.name in names:
        return Phase(entry.name)
    if close := difflib.get_close_matches(entry.name.lower().replace("_", "-")[:60], names, n=1, cutoff=0.8):
        raise InputError("this is no phase, its scripts would never run", target=_relative(tree, entry),
                         hint=f"did you mean `{close[0]}`? Otherwise give it a name that is less like it")
    return None


def _document(path: Path) -> bool:
    return path.name.startswith("README") or path.name.endswith(".md")


def _script(tree: Path, phase: Phase, path: Path, name: str) -> Script:
    if not _runnable(path):
        where = _relative(tree, path)
        raise InputError("this test script is not executable", target=where,
                         hint=f"`chmod +x {where}`, or `git update-index --chmod=+x {where}`; then commit it")
    return Script(phase, name, path)


def _runnable(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o111)


def _relative(tree: Path, path: Path) -> str:
    return _shown(os.fsencode(path.relative_to(tree)))


def _shown(name: bytes) -> str:
    return "".join(character if character.isprintable() else "�" for character in name.decode(errors="replace"))


def _entries(tree: Path, folder: Path) -> list[Path]:
    """What is in a folder, sorted by name; nothing where there is none."""
    if not os.path.lexists(folder):
        return []
    _check_inside(tree, folder)
    if not folder.is_dir():
        raise InputError("should be a directory of phases", target=_relative(tree, folder))
    return sorted(folder.iterdir(), key=lambda path: os.fsencode(path.name))


def _check_inside(tree: Path, path: Path) -> None:
    try:
        inside = path.resolve(strict=True).is_relative_to(tree)
    except (OSError, RuntimeError):
        raise InputError("this link leads nowhere", target=_relative(tree, path)) from None
    if not inside:
        raise InputError("this link leads out of the repository", target=_relative(tree, path),
                         hint="put what it points to into the repository")


def _walk(tree: Path, path: Path, around: tuple[Path, ...] = ()) -> Iterator[tuple[bytes, Path]]:
    """Every file at and below `path`, links followed: its name within the tree, and where it is."""
    if not os.path.lexists(path):
        return
    _check_inside(tree, path)
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        real = path.resolve()
        if real in around:
            raise InputError("this link leads round in a circle", target=_relative(tree, path))
        for entry in _entries(tree, path):
            yield from _walk(tree, entry, (*around, real))
    elif stat.S_ISREG(mode):
        yield os.fsencode(path.relative_to(tree)), path
    else:
        raise InputError("this is neither a file nor a directory", target=_relative(tree, path))


@dataclass(frozen=True)
class ScriptResult:
    """What came of a script: `output` is what it printed, stderr included, bounded; `problem` why it did not run."""

    script: Script
    report: tap.Report
    seconds: float
    output: str = ""
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.report.passed

    @property
    def reason(self) -> str:
        """Why it failed, or what it counted, in one line."""
        if not self.problem:
            return self.report.summary
        failed = self.report.failed
        return self.problem + (f"; failed so far: {', '.join(map(str, failed[:5]))}" if failed else "")

    @property
    def result(self) -> str:
        """passed, skipped or failed."""
        return "failed" if not self.passed else "passed" if self.report.skipped_all is None else "skipped"

    def row(self) -> dict[str, str]:
        """Its row in a table."""
        ok = sum(not test.failed for test in self.report.tests)
        return {"script": self.script.name, "result": self.result, "tests": f"{ok}/{len(self.report.tests)}",
                "seconds": f"{self.seconds:.1f}", "reason": self.reason}

    def failure_lines(self) -> list[str]:
        """The failed tests as they were printed, with their diagnostics, and what else is wrong."""
        if self.passed:
            return []
        lines = [f"{self.script.name}: {self.reason}"]
        for test in self.report.failed:
            lines += [f"  {test}", *(f"    {line}" for line in (*test.diagnostics, *test.yaml.splitlines()))]
        if not self.report.failed:
            # Nothing failed by name: the last words are the best clue.
            lines += [f"    {line}" for line in self.output.strip().split("\n")[-5:] if line]
        return [shorten(line, 500) for line in lines]


@dataclass(frozen=True)
class PhaseResult:
    """What came of the scripts of a phase; a phase without scripts passes."""

    host: str
    phase: Phase
    results: tuple[ScriptResult, ...] = ()

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    @property
    def seconds(self) -> float:
        return sum(result.seconds for result in self.results)

    def rows(self) -> list[dict[str, str]]:
        """The rows of a table: script, result, tests (ok/total), seconds, reason."""
        return [result.row() for result in self.results]

    def failure_lines(self, limit: int = 40) -> list[str]:
        """The failing tests' own lines, at most `limit`."""
        lines = [line for result in self.results for line in result.failure_lines()]
        return lines if len(lines) <= limit else [*lines[: limit - 1], f"… and {len(lines) - limit + 1} more lines"]

    def junit_xml(self) -> str:
        """The results as JUnit XML: a test suite for each script."""
        return junit_xml([self])


def junit_xml(phases: Iterable[PhaseResult]) -> str:
    """The results of several phases in one JUnit XML document."""
    root = ElementTree.Element("testsuites")
    for phase in phases:
        for result in phase.results:
            root.append(_junit_suite(f"{phase.host}/{result.script.name}", result))
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _junit_suite(name: str, result: ScriptResult) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=_xml(name), time=f"{result.seconds:.3f}")
    for test in result.report.tests:
        title = f"{test.number} {test.description}".strip()
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(name), name=_xml(title))
        if test.failed:
            failure = ElementTree.SubElement(case, "failure", message=_xml(str(test)))
            failure.text = _xml("\n".join((*test.diagnostics, *test.yaml.splitlines())))
        elif test.directive == "skip" or not test.ok:
            ElementTree.SubElement(case, "skipped", message=_xml(f"{test.directive} {test.reason}".strip()))
    skipped = result.report.skipped_all
    broken = not result.passed and (bool(result.problem) or not result.report.failed or bool(result.report.problems))
    if broken or skipped is not None:
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(name), name="the script itself")
        ElementTree.SubElement(case, "error" if broken else "skipped",
                               message=_xml(result.reason if broken else skipped or ""))
    for attribute, tag in (("tests", "testcase"), ("failures", "*/failure"), ("errors", "*/error"),
                           ("skipped", "*/skipped")):
        suite.set(attribute, str(len(suite.findall(tag))))
    ElementTree.SubElement(suite, "system-out").text = _xml(result.output)
    return suite


def _xml(text: str) -> str:
    return _XML_ILLEGAL.sub("�", text)


class _Output:
    """Lines as they come from both streams, within bounds: the first half and the last half."""

    def __init__(self, keep: int) -> None:
        self.half, self.used, self.dropped = keep // 2, 0, 0
        self.head: list[str] = []
        self.tail: deque[str] = deque()

    def add(self, line: str) -> None:
        size = len(line) + 1
        if not self.tail and self.used + size <= self.half:
            self.head.append(line)
            self.used += size
            return
        if not self.tail:
            self.used = 0
        self.tail.append(line)
        self.used += size
        while self.used > self.half and len(self.tail) > 1:
            self.used -= len(self.tail.popleft()) + 1
            self.dropped += 1

    def text(self) -> str:
        left_out = [f"[… {self.dropped} lines left out …]"] if self.dropped else []
        return "".join(f"{line}\n" for line in (*self.head, *left_out, *self.tail))


async def run_script(script: Script, env: Mapping[str, str], *, timeout: float | None = None, keep: int = OUTPUT,
                     on_line: LineSink | None = None) -> ScriptResult:
    """Run a script to its end, in its own directory, with `env` as its whole environment.

    `timeout` is seconds; of its output `keep` bytes are kept, though all of it is judged; `on_line` gets each line
    of stdout and stderr. Whatever the script does is in the result; only a cancel comes out as an exception.
    """
    began = time.monotonic()
    judge, output = tap.Judge(), _Output(keep)

    def hear(line: str) -> None:
        output.add(line)
        if on_line is not None:
            on_line(line)

    def hear_tap(line: str) -> None:
        judge.line(line)
        hear(line)

    status: int | None = None
    problem = _unable(script.path)
    if not problem:
        try:
            completed = await run([script.path], env=env, cwd=script.path.parent, timeout=timeout, check=False,
                                  keep=4096, on_line=hear_tap, on_error_line=hear)
            status = completed.status
        except CommandTimeout:
            problem = f"it did not end within {timeout:g} s and was ended"
        except CommandNotFound:
            problem = "it is gone, or not executable"
        except (OSError, ValueError) as error:
            problem = f"it could not be started: {getattr(error, 'strerror', None) or error}"
    return ScriptResult(script, judge.report(status), time.monotonic() - began, output.text(), problem)


def _unable(path: Path) -> str:
    """Why the kernel would not run a file, in words that name its shebang; nothing when it would."""
    try:
        with path.open("rb") as file:
            first = file.readline(256)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if first.startswith(b"\x7fELF"):
        return ""
    if not first.startswith(b"#!"):
        return "its first line names no interpreter: begin it with `#!/bin/sh` or `#!/usr/bin/env bash`"
    shebang = _shown(first.rstrip(b"\n").rstrip(b"\r"))
    interpreter = first[2:].rstrip(b"\n").split()
    if first.rstrip(b"\n").endswith(b"\r"):
        return f"its first line, `{shebang}`, ends like a DOS file's (CR LF): save it with plain line ends"
    if not interpreter or not os.access(interpreter[0], os.X_OK):
        return f"its first line, `{shebang}`, names an interpreter that is not here; `#!/usr/bin/env …` looks on PATH"
    return ""


async def run_phase(suite: Suite, phase: Phase, env: Mapping[str, str], *, timeout: float | None = None,
                    keep: int = OUTPUT, on_line: LineSink | None = None,
                    on_result: Callable[[ScriptResult], None] | None = None) -> PhaseResult:
    """Run the scripts of a phase, one after the other, each within `timeout` seconds; a failure stops none."""
    results = []
    for script in suite.of(phase):
        result = await run_script(script, env, timeout=timeout, keep=keep, on_line=on_line)
        results.append(result)
        if on_result is not None:
            on_result(result)
    return PhaseResult(suite.host, phase, tuple(results))


def write_on_host(directory: Path) -> Path:
    """Write the helper `on-host` into `directory`, which belongs first on the PATH of the scripts; return its path.

    It needs TOTO_SSH_CONFIG (a file for `ssh -F`) and TOTO_HOST in the environment.
    """
    path = directory / "on-host"
    path.write_text(ON_HOST)
    path.chmod(0o755)
    return path
