"""Judges strictly whether a TAP document (version 13 or 14), the output of a test script, is a pass.

A lenient reader would pass a script that died half way. So a plan is required and must hold, numbers must be in order
and unique, a subtest must agree with its parent, and the exit status must agree with the tests. No output makes this
raise or hang. The library tap.py reads only the directives of single lines: it takes "okay" for a pass, cuts
descriptions at '#', and knows no subtests. `toto.rehearsal.run` runs the scripts.
"""

import re
import signal
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from tap.directive import Directive as Words

Directive: TypeAlias = Literal["skip", "todo"]

LONGEST_LINE: Final = 16_384  # characters of a line that are read
MOST_TESTS: Final = 1_000_000
MOST_PROBLEMS: Final = 20
MOST_DIAGNOSTICS: Final = 1_000_000  # characters, for all tests together
DEEPEST: Final = 8  # levels of subtests

_TEST: Final = re.compile(r"(not )?ok(?:[ \t]+(\d{1,9})(?=[ \t]|$))?(?:[ \t]+(.*))?$", re.ASCII)
_PLAN: Final = re.compile(r"1\.\.(\d{1,9})[ \t]*(?:#(.*))?$", re.ASCII)
_VERSION: Final = re.compile(r"TAP version (\d{1,9})$", re.ASCII)
_BAIL: Final = re.compile(r"Bail out!(.*)$", re.IGNORECASE)
_YAML: Final = re.compile(r"( +)---$")
_HASH: Final = re.compile(r"(?:^|[ \t])#[ \t]*(?=skip|todo)", re.IGNORECASE)
_ESCAPED: Final = re.compile(r"\\([#\\])")
_INDENT: Final = "    "


@dataclass(frozen=True)
class Test:
    """One test. `diagnostics` has the comment lines after it, `yaml` its YAML block as it was printed."""

    number: int
    ok: bool
    description: str
    directive: Directive | None = None
    reason: str = ""
    diagnostics: tuple[str, ...] = ()
    yaml: str = ""

    @property
    def failed(self) -> bool:
        """Whether it is not ok, and not marked as todo."""
        return not self.ok and self.directive != "todo"

    def __str__(self) -> str:
        directive = f" # {self.directive} {self.reason}".rstrip() if self.directive else ""
        description = f" - {self.description}" if self.description else ""
        return f"{'' if self.ok else 'not '}ok {self.number}{description}{directive}"


@dataclass(frozen=True)
class Report:
    """The result of a document. `problems` says what is wrong besides failed tests."""

    tests: tuple[Test, ...] = ()
    plan: int | None = None
    bail_out: str | None = None
    problems: tuple[str, ...] = ()
    skipped_all: str | None = None  # the reason, when the plan is 1..0

    @property
    def failed(self) -> tuple[Test, ...]:
        """The tests that failed."""
        return tuple(test for test in self.tests if test.failed)

    @property
    def passed(self) -> bool:
        """Whether there is no failed test, no problem and no bail out."""
        return not self.problems and self.bail_out is None and not any(test.failed for test in self.tests)

    @property
    def summary(self) -> str:
        """One line of at most 300 characters."""
        failed, parts = self.failed, []
        if failed:
            names = ", ".join(f"{test.number} {test.description}".strip() for test in failed[:5])
            parts.append(f"{len(failed)} of {_tests(len(self.tests))} failed: {names}{', …' if failed[5:] else ''}")
        if self.bail_out is not None:
            parts.append(f"bailed out: {self.bail_out or 'no reason given'}")
        parts.extend(self.problems)
        if not parts:
            parts.append(self._passed())
        text = " ".join("; ".join(parts).split())
        return text if len(text) <= 300 else text[:299] + "…"

    def _passed(self) -> str:
        if self.skipped_all is not None:
            return f"skipped: {self.skipped_all or 'no reason given'}"
        counts = {word: sum(test.directive == word for test in self.tests) for word in ("skip", "todo")}
        named = ((counts["skip"], "skipped"), (counts["todo"], "todo"))
        excused = [f"{count} {name}" for count, name in named if count]
        return f"{_tests(len(self.tests))} passed" + (f" ({', '.join(excused)})" if excused else "")


def parse(text: str, exit_status: int | None = None) -> Report:
    """The report on a whole document. `exit_status` is the script's, negative for a signal. Never raises."""
    judge = Judge()
    for line in text.split("\n"):
        judge.line(line)
    return judge.report(exit_status)


class Judge:
    """Judges a document line by line, so that the document need not be kept."""

    def __init__(self) -> None:
        self._document = _Document()
        self._lines = 0

    def line(self, line: str) -> None:
        """Take the next line, with or without its line end. Never raises."""
        if not self._lines:
            line = line.removeprefix("\ufeff")
        line = line[:LONGEST_LINE].rstrip()
        self._lines += bool(line)
        self._document.line(line)

    def report(self, exit_status: int | None = None) -> Report:
        """The report on the lines so far. `exit_status` is as in `parse`."""
        document = self._document
        problems = [*document.problems(), *document.open_subtest()]
        if document.bail is None:
            if not document.is_tap:
                problems = ["it printed no TAP" if self._lines else "it printed nothing"]
            elif document.plan is None:
                problems.append("there is no plan (a line like 1..3): it may have stopped half way")
            elif document.plan != document.count:
                problems.append(f"it planned {_tests(document.plan)} and ran {document.count}")
        tests = tuple(point.test() for point in document.points)
        problems.extend(_exit(exit_status, document, tests, problems))
        return Report(tests, document.plan, document.bail, tuple(problems), document.skipped_all)


@dataclass
class _Point:
    number: int
    ok: bool
    description: str
    directive: Directive | None
    reason: str
    diagnostics: list[str] | None = None
    yaml: list[str] | None = None

    @property
    def excused(self) -> bool:
        return self.directive is not None

    def note(self, text: str) -> None:
        if self.diagnostics is None:
            self.diagnostics = []
        self.diagnostics.append(text)

    def test(self) -> Test:
        return Test(
            self.number,
            self.ok,
            self.description,
            self.directive,
            self.reason,
            tuple(self.diagnostics or ()),
            "\n".join(self.yaml or ()),
        )


@dataclass
class _Document:
    """A document, or a subtest `depth` levels down."""

    depth: int = 0
    points: list[_Point] = field(default_factory=list)
    count: int = 0
    numbers: set[int] = field(default_factory=set)
    last_number: int = 0
    plan: int | None = None
    plan_is_last: bool = False
    after_last: bool = False
    skipped_all: str | None = None
    bail: str | None = None
    child: "_Document | None" = None
    fresh: bool = False  # the previous line was a test, so a YAML block may begin
    yaml_indent: str | None = None
    room: int = MOST_DIAGNOSTICS
    _problems: list[str] = field(default_factory=list)
    _more: int = 0

    @property
    def is_tap(self) -> bool:
        return bool(self.count) or self.plan is not None or self.bail is not None

    def problem(self, what: str) -> None:
        if len(self._problems) < MOST_PROBLEMS:
            self._problems.append(what)
        else:
            self._more += 1

    def problems(self) -> list[str]:
        found = [*self._problems, *([f"{self._more} more problems"] if self._more else [])]
        if self.yaml_indent is not None:
            found.append(f"the YAML block of test {self.last_number} has no end")
        return found

    def line(self, line: str) -> None:
        if self.yaml_indent is not None and self._yaml(line):
            return
        if not line:
            return
        fresh, self.fresh = self.fresh, False
        if fresh and (begin := _YAML.match(line)):
            self.yaml_indent = begin[1]
        elif line.startswith(_INDENT):
            self._subtest(line)
        elif line.startswith("#"):
            self._comment(line)
        elif test := _TEST.match(line):
            self._test(not test[1], test[2], test[3] or "")
        elif plan := _PLAN.match(line):
            self._plan(int(plan[1]), plan[2] or "")
        elif bail := _BAIL.match(line):
            self.bail = self.bail or bail[1].strip()
        elif version := _VERSION.match(line):
            self._version(int(version[1]))
        elif line == "}" and self.points and self.points[-1].description.endswith("{"):
            # Test2 prints `ok 1 - name {`, the subtest, and `}`.
            self.points[-1].description = self.points[-1].description[:-1].rstrip()
            self._close_subtest(self.points[-1])

    def _yaml(self, line: str) -> bool:
        """Whether the line belongs to the YAML block that is open."""
        assert self.yaml_indent is not None
        if line and not line.startswith(self.yaml_indent):
            self.problem(f"the YAML block of test {self.last_number} has no end")
            self.yaml_indent = None
            return False
        if line == f"{self.yaml_indent}...":
            self.yaml_indent = None
        elif self.points and self._fits(line):
            point = self.points[-1]
            if point.yaml is None:
                point.yaml = []
            point.yaml.append(line[len(self.yaml_indent) :])
        return True

    def _fits(self, line: str) -> bool:
        self.room -= len(line) + 1
        return self.room >= 0

    def _comment(self, line: str) -> None:
        if self.points and not self.plan_is_last and not line.startswith("# Subtest") and self._fits(line):
            self.points[-1].note(line)

    def _version(self, version: int) -> None:
        if version not in (13, 14):
            self.problem(f"it speaks TAP version {version}; 13 and 14 are understood")
        elif self.count or self.plan is not None:
            self.problem("there is a version line in the middle: two documents in one")

    def _plan(self, count: int, comment: str) -> None:
        if self.plan is not None:
            self.problem(f"there is a second plan, 1..{count}")
            return
        self.plan, self.plan_is_last = count, bool(self.count)
        if count == 0:
            words = Words(comment.strip())
            self.skipped_all = (words.reason if words.skip else comment).strip()

    def _test(self, ok: bool, number: str | None, rest: str) -> None:
        self.count += 1
        expected = self.last_number + 1
        self.last_number = this = expected if number is None else int(number)
        if this in self.numbers:
            self.problem(f"test number {this} comes twice")
        elif this != expected:
            self.problem(f"test {this} comes where {expected} was due")
        if self.plan_is_last and not self.after_last:
            self.after_last = True
            self.problem("there are tests after the plan at the end")
        if self.count > MOST_TESTS:
            if self.count == MOST_TESTS + 1:
                self.problem(f"there are more than {MOST_TESTS} tests")
            return
        self.numbers.add(this)
        point = _Point(this, ok, *_described(rest))
        self.points.append(point)
        self.fresh = True
        if self.child is not None and not point.description.endswith("{"):
            self._close_subtest(point)

    def _subtest(self, line: str) -> None:
        if self.depth == DEEPEST:
            return
        if self.child is None:
            self.child = _Document(self.depth + 1, room=self.room)
        self.child.line(line[len(_INDENT) :])
        if self.child.bail is not None and self.bail is None:
            self.bail = self.child.bail

    def _close_subtest(self, parent: _Point) -> None:
        child, self.child = self.child, None
        fault = child.fault() if child is not None else ""
        if fault and parent.ok and not parent.excused:
            self.problem(f"test {parent.number} is ok, but not its subtest: {fault}")
        elif fault:
            parent.note(f"# subtest: {fault}")

    def open_subtest(self) -> list[str]:
        """What is wrong with a subtest that is not followed by its test."""
        fault = self.child.fault() if self.child is not None else ""
        return [f"a subtest at the end has no test that it belongs to: {fault}"] if fault else []

    def fault(self) -> str:
        """What is wrong with this as a subtest; "" for indented text that is not TAP."""
        if not self.is_tap:
            return ""
        found = [str(point.test()) for point in self.points if not point.ok and point.directive != "todo"][:5]
        found += [*self.problems(), *self.open_subtest()]
        if self.plan is not None and self.plan != self.count:
            found.append(f"it planned {_tests(self.plan)} and ran {self.count}")
        return "; ".join(found)


def _described(rest: str) -> tuple[str, Directive | None, str]:
    """The parts of the text after a test's number: its description, its directive, and the reason of that."""
    directive: Directive | None = None
    reason = ""
    if "#" in rest:
        for mark in _HASH.finditer(rest):
            words = Words(rest[mark.end() :])
            if words.skip or words.todo:
                directive, reason = "skip" if words.skip else "todo", (words.reason or "").strip()
                rest = rest[: mark.start()]
                break
    rest = rest.strip()
    if rest.startswith("-"):
        rest = rest[1:].lstrip()
    return (_ESCAPED.sub(r"\1", rest) if "\\" in rest else rest), directive, reason


def _exit(status: int | None, document: _Document, tests: tuple[Test, ...], problems: list[str]) -> list[str]:
    """What is wrong with the exit status: it should be 0 unless tests failed."""
    if status is None or status == 0:
        return []
    if status < 0:
        try:
            return [f"it was ended by {signal.Signals(-status).name}"]
        except ValueError:
            return [f"it was ended by signal {-status}"]
    if document.bail is not None or any(test.failed for test in tests):
        return []
    though = " though every test passed" if tests and not problems else ""
    return [f"it exited with status {status}{though}"]


def _tests(count: int) -> str:
    return f"{count} test" if count == 1 else f"{count} tests"
