"""The result of a run as one short text message that makes sense on a phone at three in the morning.

`toto.report.venues` decides who gets it and sends it; `toto.report.notified` decides whether it is news to a venue.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from textwrap import dedent
from typing import Any, Final, Literal, Self, TypeAlias

from toto.base.process import shorten
from toto.infra_repo.git import Commit
from toto.plan.alike import listed
from toto.plan.changes import Action
from toto.report.report import Report, Reverted, RunDied, revert_words

State: TypeAlias = Literal["failed", "partial", "done", "recovered"]

STUCK: Final = "COULD NOT BE REVERTED"
IN_FULL: Final = 3  # problems that are shown with their lines; the others are only named
LINES: Final = 7  # shown of one problem
LINE: Final = 160  # characters shown of a line

_ESCAPES: Final = re.compile(r"\x1b(\[[0-9;:?]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)")
_STORE: Final = re.compile(r"/nix/store/[0-9a-z]{32}-")
_VARYING: Final = re.compile(r"\b[0-9a-f-]{7,}\b|\d+")  # commits, runs, seconds, ports: they differ each time


def clean(text: str) -> str:
    """Text without terminal escapes, control characters, and characters that reverse the reading direction."""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\t", "    "))
    return "".join(
        " " if each.isspace() and each != "\n" else each for each in text if each.isprintable() or each.isspace()
    )


def one_line(text: str, limit: int = 300) -> str:
    """Clean text as one line of at most `limit` characters."""
    return shorten(" ".join(clean(shorten(text, 10_000)).split()), limit)


@dataclass(frozen=True)
class Style:
    """How a medium formats text."""

    escape: Callable[[str], str]
    bold: Callable[[str], str]
    block: Callable[[Sequence[str]], str]
    link: Callable[[str], str]


def _fence(lines: Sequence[str]) -> str:
    text = "\n".join(lines).replace("```", "'''")
    return f"```\n{text}\n```"


def _slack_escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


PLAIN: Final = Style(escape=str, bold=str, link=str, block=lambda lines: "\n".join(f"    {line}" for line in lines))
MARKDOWN: Final = Style(
    escape=lambda text: re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", text),
    bold=lambda text: f"**{text}**",
    block=_fence,
    link=lambda url: f"[the run]({url})",
)
SLACK: Final = Style(
    escape=lambda text: _slack_escape(text.replace("`", "'")),
    bold=lambda text: f"*{text}*",
    block=lambda lines: _slack_escape(_fence(lines)),
    link=lambda url: f"<{url}|the run>",
)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one target: `what` and `why` in one line, `lines` with details, and `hint` as the next step.

    `key` is the same for the same failure. It depends on target, stage and failing tests, not on times and paths.
    """

    target: str
    what: str
    why: str = ""
    lines: tuple[str, ...] = ()
    hint: str = ""
    key: str = ""

    @classmethod
    def of(cls, target: str, what: str, text: str) -> Self:
        """The problem in an error's text: its message, further lines, and a last line `next: …` with the hint."""
        short = _STORE.sub("…-", clean(shorten(text, 20_000)))
        first, *rest = short.removeprefix(f"{target}: ").split("\n")
        hint = rest.pop().removeprefix("next: ") if rest and rest[-1].startswith("next: ") else ""
        failing = sorted(line.strip() for line in rest if line.lstrip().startswith("not ok"))
        errors = [_VARYING.sub("#", line) for line in (first, *rest) if line is first or line.startswith("error")]
        essence = "\n".join((target, what, *(failing or errors)))
        lines = [line for line in dedent("\n".join(rest)).split("\n") if line.strip()]
        if len(lines) > LINES:
            lines = [*lines[: LINES - 3], "…", *lines[-2:]]
        return cls(
            target=one_line(target),
            what=what,
            why=one_line(first),
            hint=one_line(hint),
            lines=tuple(shorten(line, LINE) for line in lines),
            key=hashlib.sha256(essence.encode()).hexdigest()[:16],
        )

    @property
    def header(self) -> str:
        return ": ".join(filter(None, (_said(self.target, self.what), self.why.rstrip(":"))))


@dataclass(frozen=True)
class Message:
    """The result of a run.

    `stuck` are the targets that could not be reverted, `changed` those that were deployed and stayed so. `good` are the
    targets that are known to be as the commit says; with `all_good` all of them are. `aftermath` says what a failure
    did to the fleet. `recovered` has the targets that had failed as far as the reader knows, and since when.
    """

    repo: str
    state: State
    summary: str
    commit: Commit | None = None
    link: str = ""
    problems: tuple[Problem, ...] = ()
    stuck: tuple[Problem, ...] = ()
    aftermath: str = ""
    changed: tuple[str, ...] = ()
    recovered: Mapping[str, str] = field(default_factory=dict)
    good: frozenset[str] = frozenset()
    all_good: bool = False

    @classmethod
    def of(cls, report: Report, commit: Commit, link: str) -> Self:
        """The message of a run that reached its end."""
        problems = _failed(report)
        problems += [_away(name, report.away.get(name, "")) for name in report.unreachable]
        problems += [Problem.of(name, "held back", reason) for name, reason in report.held.items()]
        bad = {each.target for each in problems} | {each.target for each in report.reverted}
        changed = tuple(name for name, end in report.outcome.items() if end == "deployed" and name not in bad)
        return cls(
            repo=one_line(report.repo),
            state="failed" if report.failed else "done" if report.complete else "partial",
            summary=one_line(report.headline().removeprefix(f"{report.commit[:8]}: ")),
            commit=commit,
            link=link,
            problems=tuple(problems),
            changed=changed,
            stuck=_stuck(report.reverted),
            aftermath=one_line(report.aftermath()) if report.failed else "",
            good=(frozenset(report.outcome) | {each.label for each in report.changes.unchanged}) - bad,
            all_good=report.complete
            and report.changes.whole
            and all(
                change.label in report.outcome
                for change in report.changes.changes
                if change.action in (Action.DEPLOY, Action.VERIFY)
            ),
        )

    @classmethod
    def broken_off(cls, repo: str, error: BaseException, commit: Commit | None, link: str) -> Self:
        """The message of a run that broke off: by a wrong manifest, an error of toto's own, or a kill."""
        problem = Problem.of("the run", "failed", str(error) or repr(error))
        reverted = error.reverted if isinstance(error, RunDied) else []
        aftermath = one_line(revert_words(reverted)) if reverted else ""
        return cls(
            repo=one_line(repo),
            state="failed",
            summary="; ".join(filter(None, (problem.header, aftermath))),
            commit=commit,
            link=link,
            problems=(problem,),
            stuck=_stuck(reverted),
            aftermath=aftermath,
        )

    def about(self, targets: Collection[str]) -> Self:
        """The same message for a reader who only wants to know about these targets."""
        problems = tuple(each for each in self.problems if each.target in targets)
        stuck = tuple(each for each in self.stuck if each.target in targets)
        bad = bool(problems or stuck)
        return replace(
            self,
            state=self.state if bad else "done",
            problems=problems,
            stuck=stuck,
            aftermath=self.aftermath if bad else "",
            changed=tuple(name for name in self.changed if name in targets),
        )

    def is_good(self, target: str) -> bool:
        """Whether a target is as the commit says, as far as this run found out."""
        return self.all_good or target in self.good

    @property
    def id(self) -> str:
        """An id (32 hex digits) that is the same for the same message of the same run."""
        return hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode()).hexdigest()[:32]

    @property
    def title(self) -> str:
        """One line that says which repo, which targets, and what happened."""
        return f"[{self.repo}] {self._what()}"

    def _what(self) -> str:
        if self.stuck:
            return _said(names(self.stuck), self.stuck[0].what)
        if self.problems:
            whats = {each.what for each in self.problems}
            several = "failed" if self.state == "failed" else "not deployed"
            return _said(names(self.problems), whats.pop() if len(whats) == 1 else several)
        if self.recovered:
            return f"{names([*self.recovered])} fine again"
        return f"{names(self.changed)} deployed" if self.changed else self.summary

    def text(self, style: Style = PLAIN) -> str:
        """The text below the title: what failed and the lines that show it, what was reverted, the commit, the link."""
        urgent = _together([*self.stuck, *self.problems])
        parts = [_problem(each, style) for each in urgent[:IN_FULL]]
        if more := urgent[IN_FULL:]:
            parts.append(style.escape(f"and {len(more)} more: {names(more)}"))
        if self.aftermath:
            parts.append(style.bold(style.escape(self.aftermath)))
        elif self.summary != self._what() and not self.problems:
            parts.append(style.escape(self.summary))
        elif self.changed and self.problems:
            parts.append(style.escape(f"{names(self.changed)} deployed"))
        if self.recovered:
            since = min(self.recovered.values())[:16].replace("T", " ")
            parts.append(style.escape(f"{names([*self.recovered])} had failed since {since} UTC"))
        return "\n\n".join([*parts, self.footer(style)])

    def footer(self, style: Style = PLAIN) -> str:
        """Commit, author and link."""
        lines = []
        if self.commit is not None:
            subject = shorten(one_line(self.commit.subject), 72)
            author = shorten(one_line(self.commit.author), 40)
            lines.append(style.escape(f"{self.commit.hash[:8]} {subject} ({author})"))
        return "\n".join(lines + ([style.link(self.link)] if self.link else []))

    def as_json(self) -> dict[str, Any]:
        """The message for a program: its fields, and the whole as text and as Markdown."""
        return {
            "id": self.id,
            **self._facts(),
            "title": self.title,
            "text": self.text(),
            "markdown": self.text(MARKDOWN),
        }

    def _facts(self) -> dict[str, Any]:
        def fields(problem: Problem) -> dict[str, Any]:
            return {"target": problem.target, "what": problem.what, "why": problem.why, "lines": list(problem.lines)}

        return {
            "repo": self.repo,
            "state": self.state,
            "summary": self.summary,
            "link": self.link,
            "commit": asdict(self.commit) if self.commit else None,
            "problems": list(map(fields, self.problems)),
            "stuck": list(map(fields, self.stuck)),
            "aftermath": self.aftermath,
            "changed": list(self.changed),
            "recovered": dict(self.recovered),
        }


def _failed(report: Report) -> list[Problem]:
    """The failures of a report. What is the same for several targets has the same words."""
    own = {(each.stage, each.target): each.text for each in report.failures}
    found = []
    for cause in report.causes:
        for name in cause.said.names:
            one = Problem.of(name, f"{cause.stage} failed", own[cause.stage, name])
            found.append(replace(Problem.of(name, one.what, cause.said.text), key=one.key))
    return found


def _together(problems: Sequence[Problem]) -> list[Problem]:
    """The problems, those that read the same as one of several targets."""
    same: dict[tuple[object, ...], list[Problem]] = {}
    for each in problems:
        same.setdefault((each.what, each.why, each.lines, each.hint), []).append(each)
    return [replace(group[0], target=names(group)) for group in same.values()]


def _away(target: str, said: str) -> Problem:
    """A machine that does not answer. It is the same problem, whatever ssh says of it this time."""
    same = Problem.of(target, "unreachable", "it does not answer")
    return replace(Problem.of(target, "unreachable", said), key=same.key) if said else same


def _stuck(reverted: Sequence[Reverted]) -> tuple[Problem, ...]:
    return tuple(Problem.of(each.target, STUCK, each.error) for each in reverted if each.error)


def _problem(problem: Problem, style: Style) -> str:
    parts = [style.bold(style.escape(problem.header))]
    if problem.lines:
        parts.append(style.block(problem.lines))
    if problem.hint:
        parts.append(style.escape(f"next: {problem.hint}"))
    return "\n".join(parts)


def names(of: Sequence[str | Problem]) -> str:
    """Names in a line. Of many, it has the first few and the number of the others."""
    return one_line(listed(list(dict.fromkeys(each if isinstance(each, str) else each.target for each in of))))


def _said(who: str, what: str) -> str:
    return f"{who} {what}" if what in ("failed", STUCK) else f"{who}: {what}"
