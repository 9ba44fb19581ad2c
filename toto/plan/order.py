"""A plan and its orders: everything that a run needs to know about a commit, and about each target of it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from toto.base.errors import InputError
from toto.base.runs import run_directory
from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings
from toto.jobs.folder import Jobs
from toto.ledger.ledger import Entry
from toto.ledger.target import Target
from toto.plan.changes import Action, Change, ChangeSet, Desired
from toto.plan.window import Rules, held_now


class Order(BaseModel):
    """Everything that the rehearsal and the roll-out of a target need to know. Each kind adds fields of its own.

    `run` is the flow run's id, `position` the target's place in the roll-out order. `override` is the reason to roll it
    out in spite of a freeze or a closed window. `try_for` are the seconds for which it is tried and then put back; 0 to
    keep it. `deploys` says whether the run will roll out the deployed branch: only
    then does what it runs for the target get credentials. `stops` says whether its failure is one of the run, and not
    just a warning.
    """

    model_config = ConfigDict(frozen=True)

    repo: Path
    run: str
    commit: str
    change: Change
    settings: Settings
    position: int = 0
    stops: bool = True
    override: str | None = None
    try_for: float = 0
    deploys: bool = True

    def check_deploys(self) -> None:
        """Raises `InputError` when the commit is not on the deployed branch: it must not be rolled out."""
        if not self.deploys:
            raise InputError(
                f"the commit {self.commit[:8]} is not on the deployed branch, and gets no credentials",
                target=self.label,
                hint="push it to the deployed branch",
            )

    @property
    def desired(self) -> Desired:
        return self.change.desired

    @property
    def target(self) -> Target:
        return self.desired.target

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def label(self) -> str:
        return self.target.label

    @property
    def scratch(self) -> Path:
        """The run's own folder, which is deleted when the run is over."""
        return run_directory(self.repo, self.run)

    @property
    def tree(self) -> Path:
        """The files of the commit, until the run is over."""
        return self.scratch / "tree"

    @property
    def rules(self) -> Rules | None:
        """The freeze and the window of this target; None when it has none of its own."""
        return None

    def held(self, entry: Entry) -> str:
        """Why the target must not be rolled out now; "" when it may be, when the run overrides that, or never does.

        `entry` is what the ledger says of it: it may have been frozen there.
        """
        if self.override or self.change.action not in (Action.DEPLOY, Action.VERIFY):
            return ""
        return str(entry.frozen or "") or held_now(self.label, self.rules, self.settings.roll_out)


class Plan(BaseModel):
    """The change set of a commit, with everything that a run needs to carry it out.

    `after` has, for each label, the labels of the targets that are rolled out before it, also of unchanged targets.
    `jobs` are those of the commit.
    """

    model_config = ConfigDict(frozen=True)

    repo: Path
    run: str
    commit: str
    manifest: Manifest
    settings: Settings
    changes: ChangeSet
    orders: tuple[SerializeAsAny[Order], ...] = ()
    after: Mapping[str, tuple[str, ...]] = {}
    jobs: Jobs = Jobs()

    def held_behind(self, stuck: Iterable[str]) -> dict[str, str]:
        """Every target that comes after one of `stuck`, and the first of those: labels of what was not rolled out."""
        return behind(stuck, self.after)

    def of_kind(self, kind: str) -> Sequence[Order]:
        """The orders of one kind."""
        return [each for each in self.orders if each.target.kind == kind]


def behind(names: Iterable[str], after: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Everything that comes after one of `names`, directly or not, and the first of those that it comes after.

    `after` has what each comes after.
    """
    followers: dict[str, list[str]] = {}
    for follower, others in after.items():
        for other in others:
            followers.setdefault(other, []).append(follower)
    found: dict[str, str] = {}
    for name in names:
        fresh = [name]
        while fresh:
            for follower in followers.get(fresh.pop(), ()):
                if follower != name and follower not in found:
                    found[follower] = name
                    fresh.append(follower)
    return found
