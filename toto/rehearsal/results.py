"""The results of test scripts: of each script, of a phase, and as JUnit XML."""

from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict

from toto.base.process import shorten
from toto.base.xml_text import xml_text
from toto.rehearsal import tap
from toto.rehearsal.suite import Phase, Script


class Rehearsal(BaseModel):
    """A host passed its rehearsal: how many tests each phase had, how many seconds each part took, and in which run.

    It is a pydantic model because it is stored as JSON: a VM that has passed is not rehearsed again.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    vm: str
    run: str
    tests: dict[str, int]
    seconds: dict[str, float]

    def __str__(self) -> str:
        return ", ".join(
            f"{phase}: {count} tests in {self.seconds[phase]:.0f} s" for phase, count in self.tests.items()
        )


@dataclass(frozen=True)
class ScriptResult:
    """The result of a script: what it printed (stdout and stderr, cut to a limit), and why it did not finish, if so."""

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
        """One line: why the script failed, or how many tests passed."""
        if not self.problem:
            return self.report.summary
        failed = self.report.failed
        return self.problem + (f"; failed so far: {', '.join(map(str, failed[:5]))}" if failed else "")

    @property
    def result(self) -> str:
        """passed, skipped or failed."""
        return "failed" if not self.passed else "passed" if self.report.skipped_all is None else "skipped"

    def row(self) -> dict[str, str]:
        """The row of the script in a table."""
        ok = sum(not test.failed for test in self.report.tests)
        return {
            "script": self.script.name,
            "result": self.result,
            "tests": f"{ok}/{len(self.report.tests)}",
            "seconds": f"{self.seconds:.1f}",
            "reason": self.reason,
        }

    def failure_lines(self) -> list[str]:
        """The failed tests as they were printed, with their diagnostics, and all other problems."""
        if self.passed:
            return []
        lines = [f"{self.script.name}: {self.reason}"]
        for test in self.report.failed:
            lines += [f"  {test}", *(f"    {line}" for line in (*test.diagnostics, *test.yaml.splitlines()))]
        if not self.report.failed:
            # No test failed: the last lines of the output are the best clue.
            lines += [f"    {line}" for line in self.output.strip().split("\n")[-5:] if line]
        return [shorten(line, 500) for line in lines]


@dataclass(frozen=True)
class PhaseResult:
    """The results of the scripts of a phase. A phase without scripts passes."""

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
        """The lines about failed tests, at most `limit`."""
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
    suite = ElementTree.Element("testsuite", name=xml_text(name), time=f"{result.seconds:.3f}")
    for test in result.report.tests:
        title = f"{test.number} {test.description}".strip()
        case = ElementTree.SubElement(suite, "testcase", classname=xml_text(name), name=xml_text(title))
        if test.failed:
            failure = ElementTree.SubElement(case, "failure", message=xml_text(str(test)))
            failure.text = xml_text("\n".join((*test.diagnostics, *test.yaml.splitlines())))
        elif test.directive == "skip" or not test.ok:
            ElementTree.SubElement(case, "skipped", message=xml_text(f"{test.directive} {test.reason}".strip()))
    skipped = result.report.skipped_all
    broken = not result.passed and (bool(result.problem) or not result.report.failed or bool(result.report.problems))
    if broken or skipped is not None:
        case = ElementTree.SubElement(suite, "testcase", classname=xml_text(name), name="the script itself")
        ElementTree.SubElement(
            case, "error" if broken else "skipped", message=xml_text(result.reason if broken else skipped or "")
        )
    for attribute, tag in (
        ("tests", "testcase"),
        ("failures", "*/failure"),
        ("errors", "*/error"),
        ("skipped", "*/skipped"),
    ):
        suite.set(attribute, str(len(suite.findall(tag))))
    ElementTree.SubElement(suite, "system-out").text = xml_text(result.output)
    return suite
