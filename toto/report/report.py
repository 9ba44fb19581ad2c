"""The report of one run, as text: what was rehearsed and rolled out, what failed and where, what was reverted.

Targets are named by their labels here, such as `web1`, `terraform/dns`, `helm/grafana`.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from toto.base.errors import TotoError
from toto.fleet import results
from toto.plan.alike import Alike, alike, listed
from toto.plan.changes import ChangeSet
from toto.plan.kinds import KINDS

Stage: TypeAlias = Literal[
    "evaluation",
    "claim",
    "rehearsal",
    "approval",
    "settling",
    "roll-out",
    "going forward",
    "drift check",
    "compliance check",
]

PARTIAL: Final = "Partial"  # the name of the state of a run that left something as it was, because it was not reached


@dataclass(frozen=True)
class Failed:
    """One failure. `text` is the error's own."""

    target: str
    stage: Stage
    text: str


@dataclass(frozen=True)
class Cause:
    """One thing that failed, for all the targets that it is the same for."""

    stage: Stage
    said: Alike

    @property
    def title(self) -> str:
        return f"{listed(self.said.names)}: {self.stage} failed"

    @property
    def first_line(self) -> str:
        return f"{self.title}: {self.said.first_line}"


@dataclass(frozen=True)
class Reverted:
    """One target of a revert: `to` says what it is now, and what could not be restored; `error` why it failed.

    `away` says that it could not be reached, so that nothing else can be done with it either.
    """

    target: str
    to: str = ""
    error: str = ""
    away: bool = False


@dataclass(frozen=True)
class Span:
    """One step on a target. `began` and `ended` are seconds of the monotonic clock."""

    target: str
    step: str
    began: float
    ended: float


class RunDied(TotoError):
    """A run's process died before its end. `reverted` has the targets that it had left half done."""

    def __init__(self, name: str, reverted: Sequence[Reverted]) -> None:
        super().__init__(
            f"{name} died in the middle: its process was killed, or toto was stopped",
            hint="find out why, then push again or start it again",
        )
        self.reverted = list(reverted)


_ENDS: Final = ("deployed", "verified", "tried", "recorded", "recorded without its CRDs", "checked", "unreachable")


@dataclass
class Report:
    """The report of a run, filled in while the run goes on. At the end it gives the state's message and the artifact.

    By label: `rehearsals` are the summaries of verdicts, `outcome` is what was done ("deployed", "unreachable" …),
    `held` is why a target was held back, `away` what ssh said of one that is unreachable, with the next step, and
    `excused` are the errors of hosts that the manifest does not list: warnings. `notes` are about no target: what did
    not work besides.
    """

    repo: str
    commit: str
    changes: ChangeSet
    failures: list[Failed] = field(default_factory=list)
    rehearsals: dict[str, str] = field(default_factory=dict)
    outcome: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)
    excused: dict[str, str] = field(default_factory=dict)
    reverted: list[Reverted] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.failures += [Failed(each.target.label, "evaluation", each.message) for each in self.changes.failed]
        self.excused |= {each.target.label: each.message for each in self.changes.excused}

    @property
    def failed(self) -> bool:
        return bool(self.failures)

    @property
    def unreachable(self) -> list[str]:
        return sorted(name for name, end in self.outcome.items() if end == "unreachable")

    @property
    def complete(self) -> bool:
        """Whether everything is now what the commit says."""
        return not (self.failures or self.held or self.unreachable)

    @property
    def partial(self) -> bool:
        """Whether nothing failed, and yet something is not what the commit says."""
        return not self.failed and not self.complete

    @property
    def failed_targets(self) -> set[str]:
        return {each.target for each in self.failures}

    @property
    def failed_roll_out(self) -> bool:
        return any(each.stage == "roll-out" for each in self.failures)

    def failure(self, target: str, stage: Stage, error: Exception) -> None:
        """A target failed at a stage."""
        self.failures.append(Failed(target, stage, str(error) or repr(error)))

    def hold_behind(self, group: Sequence[str], held_behind: Callable[[Iterable[str]], Mapping[str, str]]) -> list[str]:
        """The targets of a group that may go on. Those that come after one that was not rolled out are held back."""
        behind = held_behind([*self.unreachable, *self.held, *self.failed_targets])
        for name in group:
            if name in behind:
                self.held[name] = f"it comes after {behind[name]}, which was not rolled out"
        return [name for name in group if name not in self.held]

    @property
    def causes(self) -> list[Cause]:
        """What failed, each thing once: failed roll-outs first."""
        found: dict[Stage, list[tuple[str, str]]] = {}
        for each in sorted(self.failures, key=lambda each: each.stage not in ("roll-out", "going forward")):
            found.setdefault(each.stage, []).append((each.target, each.text))
        return [Cause(stage, each) for stage, said in found.items() for each in alike(said)]

    @property
    def cause(self) -> str:
        """One line: what failed first; the first failed roll-out, when there is one."""
        first, *others = self.causes
        more = f" (and {len(others)} more)" if others else ""
        return f"{self.commit[:8]}: {first.first_line}{more}"

    def headline(self) -> str:
        """The result of the run in one line."""
        return "; ".join([self._result(), *self.notes])

    def _result(self) -> str:
        commit = self.commit[:8]
        if self.failures:
            return f"{self.cause}; {self.aftermath()}"
        if self.changes.nothing and not (self.outcome or self.held):
            return f"{commit}: {self.changes.nothing}"
        excused = ""
        if self.excused:
            excused = f"; {', '.join(self.excused)} failed, a warning since machines.yaml does not list it"
        if not self.outcome and not self.rehearsals and not self.held:
            plan = [change.label for change in self.changes.changes if change.label not in self.excused]
            planned = f"plan only: {', '.join(plan)} would change" if plan else self._nothing()
            return f"{commit}: {planned}{excused}"
        # In the plan's order, not in the order in which the targets happened to finish.
        labels = dict.fromkeys([*(each.label for each in self.changes.changes), *sorted(self.outcome)])
        ended = {word: [label for label in labels if self.outcome.get(label) == word] for word in _ENDS}
        if self.outcome and set(self.outcome.values()) == {"tried"}:
            return f"{commit}: {', '.join(self.outcome)} tried; {revert_words(self.reverted)}"
        said = [f"{', '.join(names)} {word}" for word, names in ended.items() if names]
        if self.held:
            said += [f"{name} held back: {reason}" for name, reason in self.held.items()]
        rest = [
            change.label
            for change in self.changes.changes
            if change.label not in {*self.outcome, *self.held, *self.excused}
        ]
        if rest:
            said.append(f"{', '.join(rest)} rehearsed only")
        return f"{commit}: {self._share() if self.partial else ''}{'; '.join(said)}{excused}"

    def _share(self) -> str:
        """How many of the targets are done, such as `2 of 3 hosts: `."""
        targets = [change.target for change in self.changes.changes]
        left = {*self.unreachable, *self.held}
        kinds = {KINDS[each.kind] for each in targets}
        many = kinds.pop().many if len(kinds) == 1 else "targets"
        if len(targets) <= 1:
            return ""
        return f"{sum(each.label not in left for each in targets)} of {len(targets)} {many}: "

    def _nothing(self) -> str:
        if self.changes.retired:
            return f"{', '.join(target.label for target in self.changes.retired)} retired; nothing else to do"
        kinds = [target.kind for target in self.changes.unchanged]
        said = [
            f"{count} {kind.many if count > 1 else kind.one}"
            for kind in KINDS.values()
            if (count := kinds.count(kind.name))
        ]
        return f"nothing to do ({', '.join(said)} as wanted)" if said else "nothing to do"

    def aftermath(self) -> str:
        """What a failure did to the fleet: what was reverted, what could not be, or that nothing was touched."""
        if self.failed_roll_out:
            return revert_words(self.reverted)
        rolled_out = set(self.outcome.values()) - {"checked", "unreachable"}
        others = "the others were rolled out" if rolled_out else "nothing was touched" if not self.reverted else ""
        return "; ".join(filter(None, (others, revert_words(self.reverted) if self.reverted else "")))

    @contextlib.contextmanager
    def timed(self, target: str, step: str) -> Iterator[None]:
        """Record how long the block takes, however it ends."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spans.append(Span(target, step, began, time.monotonic()))

    def timing(self, width: int = 50) -> str:
        """How long each step took, as bars of at most `width` characters over the time of the run; "" without steps."""
        if not self.spans:
            return ""
        spans = sorted(self.spans, key=lambda each: each.began)
        first, last = spans[0].began, max(each.ended for each in spans)
        scale = width / max(last - first, 1)
        names = [f"{each.target}: {each.step}" for each in spans]
        lines = []
        for name, each in zip(names, spans, strict=True):
            before, after = round((each.began - first) * scale), round((each.ended - first) * scale)
            bar = " " * before + "█" * max(1, after - before)
            lines.append(f"{name:<{max(map(len, names))}}  {bar:<{width + 1}}  {each.ended - each.began:5.1f} s")
        return "\n".join(lines)

    def results(self) -> list[dict[str, str]]:
        """One row for each target that the run had to do with: its label, its result, why, and how long it took.

        The last one is about all others, when the run found that they are as its commit says.
        """
        causes = {name: cause.first_line for cause in reversed(self.causes) for name in cause.said.names}
        took: dict[str, list[str]] = {}
        for span in sorted(self.spans, key=lambda each: each.began):
            took.setdefault(span.target, []).append(f"{span.step} {span.ended - span.began:.0f} s")
        rows = [
            results.row(name, end, causes.get(name, how), ", ".join(took.get(name, ())))
            for name, end, how in self.rows()
        ]
        if self.changes.whole and not self.changes.nothing:
            rows.append(results.row(results.OTHERS, results.AS_WANTED))
        return rows

    def rows(self) -> list[tuple[str, str, str]]:
        """One row for each target: its label, its result, and what is told of it nowhere else in the report."""
        rows = []
        failures = {each.target: each for each in self.failures}
        reverted = {each.target: each for each in self.reverted}
        told = {each.place: each.what for each in self.changes.told}
        for change in self.changes.changes:
            name = change.label
            if name in failures:
                end, how = f"{failures[name].stage} failed", ""
            elif name in self.excused:
                end, how = "failed, a warning", _first_line(self.excused[name], name)
            elif name in self.held:
                end, how = "held back", self.held[name]
            elif name in self.outcome:
                end, how = self.outcome[name], "" if name in self.away else self.rehearsals.get(name, "")
            else:
                end, how = "rehearsed" if name in self.rehearsals else str(change.action), self.rehearsals.get(name, "")
            if name in reverted:
                back = reverted[name]
                end += ", COULD NOT BE REVERTED" if back.error else ", reverted"
            rows.append((name, end, how))
        rows += [(each.target.label, "evaluation failed", "") for each in self.changes.failed]
        rows += [
            (each.target.label, "failed, a warning", _first_line(each.message, each.target.label))
            for each in self.changes.excused
        ]
        rows += [(name, "waiting", told.get(f"host/{name}", "no host file yet")) for name in self.changes.waiting]
        return rows + [(target.label, "retired", "nothing of it was touched") for target in self.changes.retired]


def _first_line(text: str, target: str) -> str:
    return text.removeprefix(f"{target}: ").split("\n", 1)[0].removesuffix(":")


def revert_words(reverted: Sequence[Reverted]) -> str:
    """Which targets were reverted, and which could not be."""
    back = [each.target for each in reverted if not each.error]
    stuck = [each.target for each in reverted if each.error]
    said = [f"{', '.join(back)} reverted"] if back else []
    if stuck:
        said.append(f"{', '.join(stuck)} COULD NOT BE REVERTED")
    return "; ".join(said) or "nothing had been touched"
