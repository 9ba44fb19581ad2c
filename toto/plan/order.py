"""A plan and its orders: all that is needed to act on one commit, and on one target of it."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from toto.base.runs import run_directory
from toto.helm.release import Release
from toto.infra_repo.manifest import Machine, Manifest
from toto.infra_repo.settings import Settings
from toto.ledger.target import Target
from toto.plan.changes import Change, ChangeSet, Desired
from toto.terraform.session import Root


class Order(BaseModel):
    """All that the rehearsal and the roll-out of one target need to know. `run` is the flow run's id.

    `override` is the reason for which it is rolled out in spite of a freeze or a closed window.
    """

    model_config = ConfigDict(frozen=True)

    repo: Path
    run: str
    commit: str
    change: Change
    settings: Settings
    tree: Path
    override: str | None = None

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
        """What this run writes, and what goes when it is over."""
        return run_directory(self.repo, self.run)


class HostOrder(Order):
    """One host's part of a plan."""

    machine: Machine | None
    vm: str

    @property
    def roots(self) -> Path:
        """Where this run keeps what it evaluated and built of the host from garbage collection."""
        return self.scratch / "roots" / self.name


class RootOrder(Order):
    """One terraform root's part of a plan."""

    root: Root


class ReleaseOrder(Order):
    """One helm release's part of a plan."""

    release: Release


class Plan(BaseModel):
    """The change set of one commit with what is needed to act on it."""

    model_config = ConfigDict(frozen=True)

    repo: Path
    run: str
    commit: str
    manifest: Manifest
    settings: Settings
    changes: ChangeSet
    vms: dict[str, str] = {}
    roots: dict[str, Root] = {}
    releases: dict[str, Release] = {}
    override: str | None = None

    @property
    def tree(self) -> Path:
        return run_directory(self.repo, self.run) / "tree"

    def order(self, change: Change) -> HostOrder | RootOrder | ReleaseOrder:
        """One target's part."""
        name = change.target.name
        common: dict[str, Any] = {"repo": self.repo, "run": self.run, "commit": self.commit, "change": change,
                                  "settings": self.settings, "tree": self.tree, "override": self.override}
        match change.target.kind:
            case "host":
                return HostOrder(**common, machine=self.manifest.machines.get(name), vm=self.vms.get(name, ""))
            case "terraform":
                return RootOrder(**common, root=self.roots[name])
            case "helm":
                return ReleaseOrder(**common, release=self.releases[name])

    @property
    def orders(self) -> list[HostOrder | RootOrder | ReleaseOrder]:
        return [self.order(change) for change in self.changes.changes]

    def groups(self, labels: Iterable[str]) -> list[list[str]]:
        """`labels` in groups, to be rolled out one after the other: hosts by wave and `after`, terraform, helm."""
        due = set(labels)
        behind = [Target("terraform", name).label for name in self.roots]
        behind += [Target("helm", name).label for name in self.releases]
        return [*self.manifest.order(due & self.manifest.machines.keys()), *([each] for each in behind if each in due)]

    def held_behind(self, label: str, stuck: Collection[str]) -> str | None:
        """The first of `stuck` (labels of targets that were not rolled out) that this target comes `after`."""
        after: dict[str, tuple[str, ...]] = {name: each.after for name, each in self.manifest.machines.items()}
        after |= {f"terraform/{name}": tuple(f"terraform/{other}" for other in each.after)
                  for name, each in self.roots.items()}
        after |= {f"helm/{name}": tuple(f"helm/{other}" for other in each.after)
                  for name, each in self.releases.items()}
        return next((other for other in stuck if label in dependents(other, after)), None)


def dependents(name: str, after: Mapping[str, Collection[str]]) -> set[str]:
    """What comes after `name`, and after that, and so on; without itself. `after` tells what each comes after."""
    found: set[str] = set()
    fresh = {name}
    while fresh:
        fresh = {other for other, before in after.items() if not fresh.isdisjoint(before)} - found
        found |= fresh
    return found - {name}
