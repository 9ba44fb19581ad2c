"""InSpec (https://github.com/inspec/inspec) and cinc-auditor, which takes the same arguments: what they report.

A profile is a program in Ruby that somebody pushed, so it runs in a cell. What it asks of the machine goes through
`toto.compliance.door`. InSpec exits with 0 when all passed, 100 when some failed, 101 when all were skipped, and 1 for
anything that keeps it from running, without a report then.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from toto.base import process
from toto.base.errors import InputError
from toto.compliance.results import USUAL, Control, Outcome, clipped, number

NAMES: Final = ("inspec", "cinc-auditor")
REPORTED: Final = (0, 100, 101)  # exit statuses with a report
_WORST: Final = (Outcome.ERROR, Outcome.FAILED, Outcome.NOT_CHECKED, Outcome.PASSED)
# InSpec has these, and skips them where it does not know the system, such as on NixOS.
_WORKS: Final[Mapping[str, str]] = {
    "service": "`systemd_service` works",
    "package": "`file('/run/current-system/sw/bin/…')` or `command('…')` works",
}
_UNKNOWN: Final = re.compile(r"(\w+)`? resource is not (?:yet )?supported on your OS", re.IGNORECASE)
_SYNTAX: Final = re.compile(r"^(?:.*?: )?(?P<where>\S+?:\d+): (?P<what>.*?)(?: \(SyntaxError\))?$")


class CheckFailed(InputError):
    """A check could not be run: its profile is missing or wrong, or the machine does not answer."""


def read(report: bytes, check: str, asked: Sequence[str] = ()) -> list[Control]:
    """The controls of a report (`--reporter json`) of the check `check`, of which only `asked` were to run, if any.

    Raises `CheckFailed` for what is no report, and when there is no control in it.
    """
    try:
        profiles = json.loads(report)["profiles"]
        found = [each for profile in profiles for each in _profile(profile, check)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckFailed(f"its report cannot be read: {type(error).__name__}: {error}", target=check) from None
    if not found and asked:
        raise CheckFailed(
            f"has no control {' or '.join(asked)}",
            target=check,
            hint="write the ids of its controls into `controls` in toto.toml, as `control 'ID' do` has them",
        )
    if not found:
        raise CheckFailed("has no controls", target=check, hint="write some into its folder `controls`")
    return found


def _profile(profile: Mapping[str, Any], check: str) -> list[Control]:
    if profile.get("status") in ("skipped", "failed"):
        skipped = profile["status"] == "skipped"
        return [
            Control(
                check=check,
                id=clipped(profile["name"]),
                outcome=Outcome.NOT_CHECKED if skipped else Outcome.ERROR,
                impact=USUAL if skipped else 1.0,
                message=clipped(profile.get("status_message") or profile.get("skip_message") or ""),
            )
        ]
    return [_control(each, check) for each in profile["controls"]]


def _control(control: Mapping[str, Any], check: str) -> Control:
    results, waiver = control.get("results") or (), control.get("waiver_data") or {}
    outcomes = [_outcome(each) for each in results]
    outcome = next((each for each in _WORST if each in outcomes), Outcome.NOT_CHECKED)
    telling = [each for each, its in zip(results, outcomes, strict=True) if its is outcome]
    said = [_message(each) for each in telling] if results else ["it has no tests"]
    if waiver:
        outcome, more = _waived(waiver, outcome)
        said.insert(0, more)
    return Control(
        check=check,
        id=clipped(control["id"]),
        outcome=outcome,
        impact=number(control.get("impact"), 1.0),
        title=clipped(control.get("title") or ""),
        message=clipped("\n".join(dict.fromkeys(filter(None, said)))),
        resource=clipped(", ".join(dict.fromkeys(filter(None, map(_resource, telling or results))))),
        seconds=sum(number(each.get("run_time")) for each in results),
    )


def _outcome(result: Mapping[str, Any]) -> Outcome:
    match result["status"]:
        case "passed":
            return Outcome.PASSED
        case "failed":
            return Outcome.ERROR if result.get("exception") else Outcome.FAILED
        case _:
            return Outcome.NOT_CHECKED


def _waived(waiver: Mapping[str, Any], outcome: Outcome) -> tuple[Outcome, str]:
    """The outcome of a control that has a waiver, and what is to say of that. An expired one counts no more."""
    why, until = str(waiver.get("justification") or "no reason given"), waiver.get("expiration_date")
    if str(waiver.get("message") or "").startswith("Waiver expired"):
        return outcome, f"its waiver ({why}) expired on {until}"
    if outcome is Outcome.PASSED:
        return outcome, f"it passes: its waiver ({why}) is not needed any more"
    return Outcome.WAIVED, f"waived{f' until {until}' if until else ''}: {why}"


def _message(result: Mapping[str, Any]) -> str:
    if result["status"] == "passed":
        return ""
    said = str(result.get("message") or result.get("skip_message") or "")
    what = str(result.get("code_desc") or "").strip()
    if result["status"] == "skipped" and (unknown := _UNKNOWN.search(said)):
        kind = unknown[1].lower()
        said = f"InSpec's `{kind}` does not know this system; {_WORKS.get(kind, 'use a different resource')}"
    lines = " ".join(said.split())
    return lines if what in ("", "No-op") or what in lines else f"{what}: {lines}"


def _resource(result: Mapping[str, Any]) -> str:
    kind, what = str(result.get("resource_class") or ""), str(result.get("resource_id") or "")
    if kind in ("", "noop") or what.lower().startswith(kind):
        return what if kind != "noop" else ""
    return f"{kind} {what}".strip()


def explained(check: str, stderr: str) -> CheckFailed:
    """Why InSpec ended without a report, by what it said."""
    lines = stderr.strip().splitlines()
    for line in lines:
        if "SyntaxError" in line or "syntax error" in line:
            found = _SYNTAX.match(line)
            what = f"{found['where']}: {found['what']}" if found else line
            return CheckFailed(what, target=check, hint="mend it; `inspec check` finds the same")
    if "Could not fetch inspec profile" in stderr:
        return CheckFailed(
            "InSpec finds no profile there, or not what it depends on",
            target=check,
            hint="it needs an inspec.yml; what it `depends` on has to be in the repository (`inspec vendor`)",
        )
    if "Transport error" in stderr or "[SSH] connection failed" in stderr:
        reasons = [each.strip("<>)") for each in re.findall(r"#<(?:[\w:]+): ([^>]*)>", stderr)]
        why = f": {reasons[-1]}" if reasons else ""
        return CheckFailed(
            f"InSpec could not connect to the machine{why}", target=check, hint="does the machine answer ssh?"
        )
    if "license" in stderr.lower():
        return CheckFailed(
            "InSpec wants its licence accepted",
            target=check,
            hint="read it, and set CHEF_LICENSE=accept-no-persist for toto; or put cinc-auditor on PATH",
        )
    said = process.tail(stderr) or "InSpec said nothing"
    return CheckFailed(f"InSpec ended without a report:\n{said}", target=check)
