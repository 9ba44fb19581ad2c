"""Reading the jobs of an exported commit: their scripts, `.conf` and `.env` files, contexts and groups.

All of a laminar's `cfg` folder is understood, where the jobs are in `cfg/jobs`, and the same with all in one folder.
Nothing is run here.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Final

from toto.base import after
from toto.base.errors import InputError
from toto.base.model import shown
from toto.cell import folders
from toto.infra_repo.fields import check_name
from toto.jobs import conf
from toto.jobs.conf import DEFAULT, AnyConf, ContextConf, JobConf, Line

LARGEST: Final = 1 << 20  # bytes of a `.conf` or an `.env`
MOST: Final = 1000  # jobs
_ENTRIES: Final = 20_000
_GIVEN: Final = 200  # parameters of a run
_GIVEN_SIZE: Final = 1 << 16  # characters of all of them
# A pattern that takes no longer on any name of 63 letters: nothing in brackets is repeated, and little else is.
_PLAIN: Final = re.compile(r"(?!.*\)[*+?{])(?!(.*[*+?]){5})[^{}]*")
_OF_A_JOB: Final = (".run", ".conf", ".before", ".after", ".init", ".env")


class JobsError(InputError):
    """The jobs have mistakes. `problems` holds one line for each: `file:line: what`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


@dataclass(frozen=True)
class Job:
    """A job: its name, what its `.conf` says, and its variables of the `.env`."""

    name: str
    conf: JobConf = field(default_factory=JobConf)
    env: Mapping[str, str] = field(default_factory=dict)

    def values(self, given: Mapping[str, str]) -> dict[str, str]:
        """The parameters of a run: those that are `given`, and the defaults of those that are declared.

        As in laminar, a parameter that is not declared is taken too. Raises `InputError` for a missing one, and for
        one that is none of its choices.
        """
        hint = f"its parameters are in PARAMS of {self.name}.conf"
        for each in self.conf.params:
            if each.default is None and each.name not in given:
                raise InputError(f"the parameter {each.name} is missing", target=self.name, hint=hint)
        for each in (*self.conf.params, *self.conf.matrix):
            try:
                each.check(given.get(each.name, each.choices[0] if each.choices else ""))
            except ValueError as error:
                raise InputError(str(error), target=self.name, hint=hint) from None
        if wrong := [name for name, value in given.items() if not name or "=" in name or "\0" in name + value]:
            raise InputError(f"{shown(wrong[0])} names no parameter", target=self.name, hint="write NAME=value")
        if len(given) > _GIVEN or sum(len(name) + len(value) for name, value in given.items()) > _GIVEN_SIZE:
            raise InputError(
                f"more than {_GIVEN} parameters, or {_GIVEN_SIZE >> 10} KiB of them",
                target=self.name,
                hint="give the name of a file, or a commit, in place of what is in it",
            )
        defaults = {each.name: each.default for each in self.conf.params if each.default is not None}
        return defaults | dict(given)

    def runs(self, given: Mapping[str, str]) -> list[dict[str, str]]:
        """The parameters of all the runs that are meant: one, or one for each combination of the `MATRIX`.

        Raises what `values` raises.
        """
        values = self.values(given)
        open_ = [each for each in self.conf.matrix if each.name not in given]
        return [
            values | dict(zip((each.name for each in open_), chosen, strict=True))
            for chosen in itertools.product(*(each.choices for each in open_))
        ]


@dataclass(frozen=True)
class Context:
    """Where jobs run: how many at once, and with which variables besides."""

    name: str
    conf: ContextConf = field(default_factory=ContextConf)
    env: Mapping[str, str] = field(default_factory=dict)

    def takes(self, job: Job) -> bool:
        """Whether a job may run in it."""
        named = any(fnmatchcase(self.name, pattern) for pattern in job.conf.contexts)
        return named or any(fnmatchcase(job.name, pattern) for pattern in self.conf.jobs)


@dataclass(frozen=True)
class Jobs:
    """The jobs of a commit. `scripts` says where each script is, by its name such as `NAME.run` or `before`.

    Those places, and `helpers`, a folder of programs for all jobs, are paths in the repo.
    """

    jobs: Mapping[str, Job] = field(default_factory=dict)
    contexts: Mapping[str, Context] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    scripts: Mapping[str, PurePosixPath] = field(default_factory=dict)
    helpers: PurePosixPath | None = None

    def job(self, name: str) -> Job:
        """The job of a name. Raises `InputError`."""
        if (found := self.jobs.get(name)) is None:
            raise InputError(f"there is no job {shown(name)}", hint=f"known are {', '.join(self.jobs) or 'none'}")
        return found

    def contexts_of(self, job: Job) -> list[Context]:
        """The contexts that a job may run in, in order."""
        return [each for each in self.contexts.values() if each.takes(job)]

    def groups_of(self, job: str) -> list[str]:
        """The groups that a job is in."""
        return [group for group, pattern in self.groups.items() if re.search(pattern, job)]


class _Reader:
    """Reads the files of one folder, and collects what is wrong."""

    def __init__(self, tree: Path, top: PurePosixPath) -> None:
        self.tree, self.top, self.problems = tree, top, list[str]()

    def names(self, *below: str) -> list[str]:
        return sorted(folders.listed(self.tree, *self.top.parts, *below, most=_ENTRIES))

    def lines(self, *below: str) -> list[Line]:
        """The lines of a file, by their numbers; none when it is not there."""
        path = self.top.joinpath(*below)
        data = folders.read_regular(self.tree, *path.parts, most=LARGEST)
        if data is None:
            if (self.tree / path).is_symlink() or (self.tree / path).exists():
                self.wrong(path, None, f"should be a plain file of at most {LARGEST >> 20} MiB; commit the file itself")
            return []
        text = data.decode(errors="surrogateescape").removesuffix("\n")
        if "\0" in text:
            self.wrong(path, text[: text.index("\0")].count("\n") + 1, "has a zero byte: it is no text")
            return []
        return list(enumerate(text.split("\n"), 1)) if text else []

    def conf(self, model: type[AnyConf], *below: str) -> AnyConf:
        lines = [(number, line.removesuffix("\r")) for number, line in self.lines(*below)]
        for number, line in lines:
            if any("\ud800" <= each <= "\udfff" for each in line):
                self.wrong(self.top.joinpath(*below), number, "is not UTF-8")
                return model()
        found, problems = conf.parse(lines, model)
        for number, what in problems:
            self.wrong(self.top.joinpath(*below), number, what)
        return found

    def env(self, *below: str) -> dict[str, str]:
        return conf.variables(self.lines(*below))

    def job(self, jobs: dict[str, Job], name: str, *below: str, script: bool) -> None:
        """Add a job, which has a `script`, or its `.conf` alone."""
        found = len(self.problems)
        conf = self.conf(JobConf, *below, f"{name}.conf")
        file = self.top.joinpath(*below, f"{name}.conf")
        if script and conf.command:
            self.wrong(file, None, f"has a COMMAND, and there is {ascii(name)[1:-1]}.run: remove one of them")
        elif not script and not conf.command and len(self.problems) == found:
            self.wrong(file, None, f"there is no {ascii(name)[1:-1]}.run beside it; add it, or a COMMAND=")
        jobs[name] = Job(name, conf, self.env(*below, f"{name}.env"))

    def named(self, name: str, what: str, *below: str) -> bool:
        try:
            check_name(name)
        except ValueError as error:
            self.wrong(self.top.joinpath(*below), None, f"{what}'s name {error}; rename the file")
            return False
        return True

    def wrong(self, path: PurePosixPath, line: int | None, what: str) -> None:
        where = ascii(str(path))[1:-1]
        self.problems.append(f"{where}: {what}" if line is None else f"{where}:{line}: {what}")


def read(tree: Path, path: str = "jobs") -> Jobs:
    """The jobs in the folder `path` of a commit that is exported at `tree`; none when there is no such folder.

    Raises `JobsError` with all mistakes.
    """
    top = PurePosixPath(path)
    reader = _Reader(tree, top)
    there = reader.names()
    inner = ("jobs",) if "jobs" in there and (tree / top / "jobs").is_dir() else ()
    jobs, scripts = _jobs(reader, inner)
    scripts |= {name: top / name for name in ("before", "after") if name in there}
    found = Jobs(
        jobs=jobs,
        contexts=_contexts(reader, there),
        groups=_groups(reader),
        env=reader.env("env"),
        scripts=scripts,
        helpers=top / "scripts" if "scripts" in there else None,
    )
    if not reader.problems:
        _check(reader, found, top.joinpath(*inner))
    if reader.problems:
        raise JobsError(reader.problems)
    return found


def _jobs(reader: _Reader, inner: Sequence[str]) -> tuple[dict[str, Job], dict[str, PurePosixPath]]:
    jobs: dict[str, Job] = {}
    scripts: dict[str, PurePosixPath] = {}
    there = reader.names(*inner)
    for file in there:
        name, dot, suffix = file.rpartition(".")
        if not dot or f".{suffix}" not in _OF_A_JOB or (file == "groups.conf" and not inner):
            continue
        if file not in (f"{name}.run", f"{name}.conf") or (suffix == "conf" and f"{name}.run" in there):
            pass
        elif len(jobs) == MOST:
            reader.wrong(reader.top.joinpath(*inner), None, f"has more than {MOST} jobs")
            break
        elif reader.named(name, "a job", *inner, file):
            reader.job(jobs, name, *inner, script=suffix == "run")
        if suffix not in ("conf", "env"):
            scripts[file] = reader.top.joinpath(*inner, file)
    return jobs, scripts


def _contexts(reader: _Reader, there: Sequence[str]) -> dict[str, Context]:
    """The contexts by name, sorted, as laminar tries them; without any, a default one."""
    found: dict[str, Context] = {}
    for file in reader.names("contexts") if "contexts" in there else ():
        name = file.removesuffix(".conf")
        if name != file and reader.named(name, "a context", "contexts", file):
            found[name] = Context(
                name, reader.conf(ContextConf, "contexts", file), reader.env("contexts", f"{name}.env")
            )
    return found or {DEFAULT: Context(DEFAULT)}


def _groups(reader: _Reader) -> dict[str, str]:
    """The groups of jobs: `NAME=REGEX` lines. (Prefect's UI has them as tags.)"""
    found: dict[str, str] = {}
    for number, line in reader.lines("groups.conf"):
        name, equals, pattern = line.partition("=")
        if line.startswith("#") or not line.strip():
            continue
        if not (name and equals):
            reader.wrong(reader.top / "groups.conf", number, f"{shown(line)} is no NAME=REGEX")
        elif ":" in name:  # toto's own tags have one
            reader.wrong(reader.top / "groups.conf", number, f"{shown(name)} has a colon; choose a different name")
        elif len(pattern) > 200 or not _PLAIN.fullmatch(pattern):
            reader.wrong(reader.top / "groups.conf", number, f"{shown(pattern)} may take too long; write a simpler one")
        elif why := _not_compiled(pattern):
            reader.wrong(reader.top / "groups.conf", number, f"{shown(pattern)} is no regular expression: {why}")
        else:
            found.setdefault(name, pattern)
    return found


def _not_compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return ""


def _check(reader: _Reader, found: Jobs, place: PurePosixPath) -> None:
    """What the jobs say of each other and of contexts."""

    def wrong(job: str, key: str, what: str) -> None:
        file = place / f"{job}.conf"
        lines = folders.read_regular(reader.tree, *file.parts, most=LARGEST) or b""
        setting = re.compile(rb"\s*" + key.encode() + rb"\s*=")
        line = next((number for number, line in enumerate(lines.split(b"\n"), 1) if setting.match(line)), None)
        reader.wrong(file, line, what if line is None else f"{key}: {what}")

    for name, job in found.jobs.items():
        for twice in {each.name for each in job.conf.params} & {each.name for each in job.conf.matrix}:
            wrong(name, "MATRIX", f"{twice} is declared in PARAMS, too")
        for other in job.conf.after:
            if other not in found.jobs:
                wrong(name, "AFTER", f"there is no job {shown(other)}")
        if not found.contexts_of(job):
            wrong(
                name,
                "CONTEXTS",
                f"no context takes it: {shown(', '.join(job.conf.contexts))} is none of "
                f"{', '.join(found.contexts)}; it would wait for ever",
            )
    for circle in after.in_order({name: job.conf.after for name, job in found.jobs.items()})[1]:
        wrong(circle.name, "AFTER", str(circle))
