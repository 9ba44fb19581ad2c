"""What compliance checks found on a host: one type for InSpec's controls and for the tests of pytest-testinfra."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final, Self
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict

from toto.base.errors import TotoError
from toto.base.process import shorten
from toto.base.xml_text import xml_text

GATE: Final = 0.7  # the impact from which a control that fails stops a roll-out; InSpec calls it high
USUAL: Final = 0.5  # the impact of a control that says none, as in InSpec
ITSELF: Final = "the check itself"
MOST: Final = 2_000  # controls of a machine
_LONGEST: Final = 2_000  # characters of a text
_MOST: Final = 40  # lines about failures


class Outcome(StrEnum):
    """How a control ended. What was skipped is `not checked`: nobody knows whether it holds."""

    ERROR = "error"
    FAILED = "failed"
    NOT_CHECKED = "not checked"
    WAIVED = "waived"
    PASSED = "passed"


class Control(BaseModel):
    """One control. `check` is the profile or the module that it is of, such as `inspec/base` or `compliance/ssh.py`.

    `impact` is 0 to 1; `resource` is what was looked at; `message` says why it did not pass, or what else to know.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    check: str
    id: str
    outcome: Outcome
    impact: float = USUAL
    title: str = ""
    message: str = ""
    resource: str = ""
    seconds: float = 0.0

    @classmethod
    def broken(cls, check: str, message: str) -> Self:
        """A check that could not be run at all: nothing that it would say is known, so its impact is the highest."""
        return cls(check=check, id=ITSELF, outcome=Outcome.ERROR, impact=1.0, message=clipped(message))

    @property
    def bad(self) -> bool:
        """Whether it failed, or could not be run."""
        return self.outcome in (Outcome.FAILED, Outcome.ERROR)

    @property
    def stops(self) -> bool:
        """Whether it stops a roll-out, where compliance is a gate."""
        return self.bad and self.impact >= GATE

    @property
    def name(self) -> str:
        return f"{self.check}: {self.id}"

    def row(self) -> dict[str, str]:
        """The row of the control in a table."""
        return {
            "result": self.outcome.value,
            "impact": f"{self.impact:.1f}",
            "control": self.name,
            "what": self.title,
            "why": " ".join(self.message.split()),
            "resource": self.resource,
        }


class NotCompliant(TotoError):
    """Controls of a high impact failed. The message has a line `not ok` for each."""


def clipped(text: object) -> str:
    """What a check says, as a text for a control: of a bounded length, without what no document or database holds."""
    return shorten(xml_text(shorten(str(text), 10 * _LONGEST).strip()), _LONGEST)


def number(said: object, most: float = 1e6) -> float:
    """What a check says, as a number from 0 to `most`; 0 for what is none."""
    if not isinstance(said, int | float) or not 0 <= said <= most:
        return most if isinstance(said, int | float) and said > most else 0.0
    return float(said)


def bounded(controls: Sequence[Control]) -> list[Control]:
    """Controls in order, `MOST` of them at most; that some are left out is an error of its own."""
    ordered = in_order(controls)
    if len(ordered) <= MOST:
        return ordered
    left_out = Control.broken("compliance", f"there are {len(ordered)} controls: only {MOST} are kept")
    return [left_out, *ordered[: MOST - 1]]


def in_order(controls: Iterable[Control]) -> list[Control]:
    """Controls with what needs a person first: by outcome, then the highest impact."""
    order = list(Outcome)
    return sorted(controls, key=lambda each: (order.index(each.outcome), -each.impact, each.name))


def counts(controls: Iterable[Control]) -> dict[Outcome, int]:
    """How many controls there are of each outcome."""
    outcomes = [each.outcome for each in controls]
    return {each: outcomes.count(each) for each in Outcome}


def summary(controls: Iterable[Control]) -> str:
    """In one line how many controls there are of each outcome that there is, such as `1 failed, 12 passed`."""
    return ", ".join(f"{count} {each}" for each, count in counts(controls).items() if count) or "no controls"


def failure_lines(controls: Sequence[Control]) -> list[str]:
    """A line `not ok` for each control that failed or could not be run, followed by why; at most 40 lines."""
    lines = []
    for each in in_order(each for each in controls if each.bad):
        lines.append(f"not ok {each.name}{f' ({each.title})' if each.title else ''}, impact {each.impact:.1f}")
        lines += [f"    {line}" for line in each.message.splitlines() if line.strip()][:5]
    return lines if len(lines) <= _MOST else [*lines[: _MOST - 1], f"… and {len(lines) - _MOST + 1} more lines"]


def junit_xml(host: str, controls: Sequence[Control]) -> str:
    """The results as JUnit XML: a test suite for each check. What was waived or not checked is skipped there."""
    root = ElementTree.Element("testsuites")
    for check in dict.fromkeys(each.check for each in controls):
        of_check = [each for each in controls if each.check == check]
        found = counts(of_check)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=xml_text(f"{host}/{check}"),
            tests=str(len(of_check)),
            failures=str(found[Outcome.FAILED]),
            errors=str(found[Outcome.ERROR]),
            skipped=str(found[Outcome.NOT_CHECKED] + found[Outcome.WAIVED]),
            time=f"{sum(each.seconds for each in of_check):.3f}",
        )
        for each in of_check:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=xml_text(f"{host}/{check}"),
                name=xml_text(" ".join(filter(None, (each.id, each.title)))),
                time=f"{each.seconds:.3f}",
            )
            if tag := _JUNIT.get(each.outcome):
                said = each.message if each.outcome is not Outcome.WAIVED else f"waived: {each.message}"
                ElementTree.SubElement(case, tag, message=xml_text(said))
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


_JUNIT: Final = {
    Outcome.ERROR: "error",
    Outcome.FAILED: "failure",
    Outcome.NOT_CHECKED: "skipped",
    Outcome.WAIVED: "skipped",
}
