"""The story of one run: what was rehearsed and rolled out, what failed and where, what was put back. Text only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from toto.changes import Action, ChangeSet
from toto.manifest import Manifest

Stage: TypeAlias = Literal["evaluation", "rehearsal", "settling", "roll-out"]


@dataclass(frozen=True)
class Failed:
    """One failure, in the words of the error."""

    host: str
    stage: Stage
    text: str


@dataclass(frozen=True)
class Returned:
    """One host of a revert: the path it is back at, or why it could not be put back."""

    host: str
    path: str = ""
    error: str = ""


@dataclass
class Story:
    """Told as it happens, read at the end: a headline for the state's message, Markdown for the artifact."""

    repo: str
    commit: str
    changes: ChangeSet
    failures: list[Failed] = field(default_factory=list)
    rehearsals: dict[str, str] = field(default_factory=dict)
    outcome: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    put_back: list[Returned] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.failures += [Failed(each.name, "evaluation", each.message) for each in self.changes.failed]

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
    def failed_hosts(self) -> set[str]:
        return {each.host for each in self.failures}

    @property
    def failed_roll_out(self) -> bool:
        return any(each.stage == "roll-out" for each in self.failures)

    def failure(self, host: str, stage: Stage, error: Exception) -> None:
        """A host failed at a stage."""
        self.failures.append(Failed(host, stage, str(error) or repr(error)))

    def hold_behind(self, group: Sequence[str], manifest: Manifest) -> list[str]:
        """Of a group, the hosts that may go on; those that come `after` one that did not get there are held."""
        stuck = [*self.unreachable, *self.held, *self.failed_hosts]
        for name in group:
            if behind := next((other for other in stuck if name in manifest.dependents(other)), None):
                self.held[name] = f"it comes after {behind}, which was not rolled out"
        return [name for name in group if name not in self.held]

    def headline(self) -> str:
        """One line: what became of this run."""
        commit = self.commit[:8]
        if self.failures:
            first = self.failures[0]
            what = f"{first.host}: {first.stage} failed: {_first_line(first.text, first.host)}"
            more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
            return f"{commit}: {what}{more}; {self._aftermath()}"
        if not self.outcome and not self.rehearsals and not self.held:
            plan = [change.host.name for change in self.changes.changes]
            return f"{commit}: " + (f"plan only: {', '.join(plan)} would change" if plan else self._nothing())
        ended = {word: [name for name, end in self.outcome.items() if end == word]
                 for word in ("deployed", "verified", "unreachable")}
        said = [f"{', '.join(names)} {word}" for word, names in ended.items() if names]
        if self.held:
            said += [f"{name} held back: {reason}" for name, reason in self.held.items()]
        rest = [change.host.name for change in self.changes.changes
                if change.host.name not in self.outcome and change.host.name not in self.held]
        if rest:
            said.append(f"{', '.join(rest)} " + ("rehearsed only" if any(
                change.action is Action.REHEARSE for change in self.changes.changes) else "recorded"))
        return f"{commit}: {'; '.join(said)}"

    def _nothing(self) -> str:
        if self.changes.retired:
            return f"{', '.join(self.changes.retired)} retired; nothing else to do"
        return f"nothing to do, {len(self.changes.unchanged)} hosts are as they should be"

    def _aftermath(self) -> str:
        if not self.failed_roll_out:
            return "nothing was touched" if not self.outcome else "the others were rolled out"
        back = [each.host for each in self.put_back if not each.error]
        stuck = [each.host for each in self.put_back if each.error]
        said = [f"{', '.join(back)} put back"] if back else []
        if stuck:
            said.append(f"{', '.join(stuck)} COULD NOT BE PUT BACK")
        return "; ".join(said) or "nothing had been touched"

    def rows(self) -> list[tuple[str, str, str]]:
        """One row a host: name, what became of it, why or how."""
        rows = []
        failures = {each.host: each for each in self.failures}
        returned = {each.host: each for each in self.put_back}
        for change in self.changes.changes:
            name = change.host.name
            if name in failures:
                end, how = f"{failures[name].stage} failed", _first_line(failures[name].text, name)
            elif name in self.held:
                end, how = "held back", self.held[name]
            elif name in self.outcome:
                end, how = self.outcome[name], self.rehearsals.get(name, "")
            else:
                end, how = "rehearsed" if name in self.rehearsals else str(change.action), self.rehearsals.get(name, "")
            if name in returned:
                back = returned[name]
                end += ", COULD NOT BE PUT BACK" if back.error else ", put back"
            rows.append((name, end, how))
        rows += [(each.name, "evaluation failed", _first_line(each.message, each.name)) for each in self.changes.failed]
        rows += [(name, "waiting", "no host file yet") for name in self.changes.waiting]
        return rows + [(name, "retired", "left the manifest") for name in self.changes.retired]


def _first_line(text: str, host: str) -> str:
    return text.removeprefix(f"{host}: ").split("\n", 1)[0]
