"""A job's `.conf`, and a context's: `KEY=value` lines, laminar's keys and toto's own.

A line that begins with `#` is a comment. What is wrong is told with its line.
"""

import difflib
import math
import re
import shlex
import zoneinfo
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, TypeVar

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from toto.base.model import Model, explain, shown
from toto.infra_repo.fields import Distinct, Name
from toto.infra_repo.settings import is_venue_name

DEFAULT: Final = "default"  # the context of a job that names none
GIVEN: Final = frozenset(  # the variables that every run has; no parameter may have such a name
    {"RUN", "JOB", "RESULT", "LAST_RESULT", "WORKSPACE", "ARCHIVE", "CONTEXT", "LAMINAR_REASON", "PATH", "HOME"}
)
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_REPEATED: Final = frozenset({"PARAMS", "SCHEDULE", "MATRIX"})
_SOME_DAY: Final = datetime(2026, 1, 1, tzinfo=UTC)
LONGEST: Final = 7 * 86_400  # seconds
_GRACE: Final = 40  # seconds; three of them are less than `toto.server.fork_server.ENDING`, which ends an aborted run
_COMBINATIONS: Final = 64  # of a matrix

Problem: TypeAlias = tuple[int, str]
"""a line's number, and what is wrong in it"""
Line: TypeAlias = tuple[int, str]
"""a line's number, and its text"""


@dataclass(frozen=True)
class Parameter:
    """A parameter that a job declares. One without a `default` must be given; `choices` are all that it may be."""

    name: str
    default: str | None = None
    choices: tuple[str, ...] = ()
    description: str = ""

    def check(self, value: str) -> None:
        """Raises ValueError for a value that it may not have."""
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name} should be one of {', '.join(self.choices)}, not {shown(value)}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The parameter of a line such as `LEVEL=low|high -- how much is checked`; the first choice is the default.

        Raises ValueError.
        """
        declared, _, description = text.partition(" -- ")
        name, equals, value = declared.strip().partition("=")
        if not _VARIABLE.fullmatch(name):
            raise ValueError(
                f"should be NAME, NAME=default or NAME=this|that, and ' -- what it is' if you like, not {shown(text)}"
            )
        if name in GIVEN:
            raise ValueError(f"{name} is set by toto; choose a different name")
        choices = tuple(value.split("|")) if "|" in value else ()
        if len(set(choices)) < len(choices):
            raise ValueError(f"{name} has the same choice twice")
        return cls(name, (choices[0] if choices else value) if equals else None, choices, description.strip())


@dataclass(frozen=True)
class Schedule:
    """When a job begins by itself: a cron line of five fields, and its time zone."""

    cron: str
    zone: str = "UTC"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The schedule of a text such as `0 3 * * *` or `0 3 * * Mon-Fri Europe/Berlin`. Raises ValueError."""
        *fields, last = [*text.split(), ""] if len(text.split()) == 5 else text.split()
        zone = last or "UTC"
        if len(fields) != 5:
            raise ValueError(f"should be five fields of cron and a time zone if you like, not {shown(text)}")
        cron = " ".join(fields)
        try:
            zoneinfo.ZoneInfo(zone)
        except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
            raise ValueError(f"{shown(zone)} is no time zone; write one like 'Europe/Berlin'") from None
        try:
            next(CronSim(cron, _SOME_DAY))
        except CronSimError as error:
            raise ValueError(f"{shown(cron)} is no cron line: {error}") from None
        except StopIteration:
            raise ValueError(f"{shown(cron)} is a time that never comes") from None
        return cls(cron, zone)


def _words(value: object) -> object:
    """What a list is, written with commas or blanks."""
    return tuple(part for part in re.split(r"[,\s]+", value) if part) if isinstance(value, str) else value


def _globs(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _block_name(name: str) -> str:
    if not is_venue_name(name):
        raise ValueError("should be the name of a block: lower-case letters, digits and '-'")
    return name


def _unquoted(command: str) -> str:
    """A command, without quotes around the whole of it."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"is no command for a shell: {str(error).lower()}") from None
    return words[0] if len(words) == 1 and command[0] in "'\"" and " " in words[0] else command


def _each(parse: Any) -> BeforeValidator:
    return BeforeValidator(lambda values: tuple(parse(value) for value in values))


def _check_parameters(parameters: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    names = [each.name for each in parameters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is declared twice")
    return parameters


def _check_matrix(matrix: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    if single := [each.name for each in matrix if not each.choices]:
        raise ValueError(f"{single[0]} should have several values: {single[0]}=this|that")
    if (count := math.prod(len(each.choices) for each in matrix)) > _COMBINATIONS:
        raise ValueError(f"makes {count} runs; at most {_COMBINATIONS} are made at once")
    return _check_parameters(matrix)


Globs = Annotated[tuple[str, ...], BeforeValidator(_globs)]
BlockNames = Annotated[tuple[Annotated[str, AfterValidator(_block_name)], ...], BeforeValidator(_words), Distinct]
Names = Annotated[tuple[Name, ...], BeforeValidator(_words), Distinct]
Event: TypeAlias = Literal["deployed", "failed", "reverted"]
"""what a roll-out may have done to targets"""
Events = Annotated[tuple[Event, ...], BeforeValidator(_words), Distinct]
Seconds = Annotated[float, Field(ge=0, le=LONGEST, allow_inf_nan=False)]


class JobConf(Model):
    """What a job's `.conf` says; in the file the names are in capital letters."""

    description: str = ""
    """one line for people"""
    command: Annotated[str, Field(max_length=8192), AfterValidator(_unquoted)] = ""
    """what runs in place of `NAME.run`: a line for bash, which ends with its first failure, also in a pipe"""
    timeout: Seconds = 0
    """seconds that a run may take, with its `.after`; 0: as long as it likes"""
    contexts: Annotated[Globs, Field(min_length=1)] = (DEFAULT,)
    """patterns of the contexts that it may run in"""
    params: Annotated[tuple[Parameter, ...], AfterValidator(_check_parameters), _each(Parameter.parse)] = ()
    """its parameters, a line each: `NAME`, `NAME=default` or `NAME=this|that`, and ` -- description`"""
    schedule: Annotated[tuple[Schedule, ...], _each(Schedule.parse)] = ()
    """when it begins by itself, a line each: five fields of cron, and a time zone (UTC when left out)"""
    after: Names = ()
    """jobs; whenever one of them succeeds, this one begins"""
    on: Events = ()
    """begins after a run that has `deployed` targets, in which some have `failed`, or were `reverted`"""
    matrix: Annotated[tuple[Parameter, ...], AfterValidator(_check_matrix), _each(Parameter.parse)] = ()
    """parameters, a line each: `NAME=this|that`; each combination of those that are not given is a run of its own"""
    once: bool = False
    """whether a run that waits already, with the same parameters, stands for a new one"""
    locks: Names = ()
    """names of locks; runs that have one in common, of whichever jobs, never run at the same time"""
    approve: Seconds = 0
    """seconds that a run waits for a person's approval before anything else; 0: it needs none"""
    retry: Annotated[int, Field(ge=0, le=20)] = 0
    """how many times a run that has failed is tried again"""
    retry_wait: Seconds = 60
    """seconds before it is tried again; twice as many each time"""
    grace: Annotated[float, Field(ge=0, le=_GRACE, allow_inf_nan=False)] = 2
    """seconds from SIGTERM to SIGKILL, when a run is aborted or takes too long; and those that `.after` has then"""
    access: BlockNames = ()
    """names of blocks `Toto job access`, which say what secrets it is given, and what it may reach besides"""
    machines: Names = ()
    """machines of the manifest on which it runs commands, by `on-host MACHINE COMMAND…`"""
    venues: BlockNames = ()
    """names of the venues that are notified when it fails and did not before, and when it succeeds again"""
    public: bool = False
    """whether its state and its badge are shown without a login"""
    network: Literal["internet", "none"] = "internet"
    """what it may reach: the internet without private networks, or nothing"""
    keep: Annotated[int, Field(ge=1, le=100_000)] = 100
    """how many runs are kept, with their logs and archives"""
    keep_days: Annotated[int, Field(ge=1, le=3650)] = 90
    """for how many days a run is kept; the newest one is kept for good"""
    log_limit: Annotated[int, Field(ge=1, le=10_000)] = 100
    """MB of a run's log that are kept: its beginning and its end"""


class ContextConf(Model):
    """What a context's `.conf` says."""

    executors: Annotated[int, Field(ge=1, le=1000)] = 6
    """how many runs there may be at once"""
    jobs: Globs = ()
    """patterns of the jobs that may run in it, besides those that name it themselves"""


AnyConf = TypeVar("AnyConf", JobConf, ContextConf)


def parse(lines: Iterable[Line], model: type[AnyConf]) -> tuple[AnyConf, list[Problem]]:
    """What the lines of a `.conf` say, and what is wrong in them. With a problem the model is the default one."""
    values: dict[str, Any] = {}
    where: dict[str, list[int]] = {}
    problems: list[Problem] = []
    known = [name.upper() for name in model.model_fields]
    for number, line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            problems.append((number, f"{shown(line)} is no KEY=value; begin a comment with '#'"))
        elif key not in known:
            problems.append((number, f"{shown(key)} is not a known key; {_meant(key, known)}"))
        elif key in where and key not in _REPEATED:
            problems.append((number, f"{key} is set again; line {where[key][0]} has set it"))
        else:
            where.setdefault(key, []).append(number)
            if key in _REPEATED:
                values.setdefault(key.lower(), []).append(value)
            else:
                values[key.lower()] = value
    try:
        found = model.model_validate(values)
    except ValidationError as error:
        for location, what in explain(error, model):
            key = str(location[0]).upper()
            problems.append((_line_of(key, values, where, model), f"{key}: {what}"))
    return (model() if problems else found), sorted(problems)


def _line_of(key: str, values: Mapping[str, Any], where: Mapping[str, list[int]], model: type[Model]) -> int:
    """The line that the mistake is in: of a key that may be repeated, the first that is wrong by itself."""
    for number, value in zip(where[key], values[key.lower()], strict=False) if key in _REPEATED else ():
        try:
            model.model_validate({key.lower(): [value]})
        except ValidationError:
            return number
    return where[key][-1]


def _meant(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key.upper()[:60], known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def variables(lines: Iterable[Line]) -> dict[str, str]:
    """The variables of an `.env`, as laminar reads it: literal values, quotes and blanks kept, of two the first.

    A line without `=`, or that begins with `#`, says nothing.
    """
    found: dict[str, str] = {}
    for _, line in lines:
        name, equals, value = line.partition("=")
        if name and equals and not line.startswith("#"):
            found.setdefault(name, value)
    return found
