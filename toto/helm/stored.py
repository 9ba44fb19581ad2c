"""What helm stores of a release: its revisions, their manifests, hooks and tests."""

import hashlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Final

from toto.helm import diff, manifest
from toto.helm.manifest import Key, Resource
from toto.helm.secret import Masks

RUN: Final = "toto/run"  # the annotation of a chart of toto's own with the id of the run that deploys it
_ROLLED_BACK: Final = "Rollback to "
_PENDING: Final = ("pending-install", "pending-upgrade", "pending-rollback", "uninstalling")

# One field a line; text that may contain anything is in hexadecimal. Only helm 4 knows APPLIES.
_TEMPLATE: Final = (
    "{{with .Release}}{{.Version}}\n{{.Info.Status}}\n{{.Chart.Metadata.Name}}-{{.Chart.Metadata.Version}}\n"
    '{{printf "%x" .Info.Description}}\n{{.Info.LastDeployed.Unix}}\nAPPLIES\n'
    f'{{{{with .Chart.Metadata.Annotations}}}}{{{{printf "%x" (index . "{RUN}")}}}}{{{{end}}}}\n'
    '{{printf "%x" .Manifest}}'
    "{{range .Hooks}}\n{{.Kind}}\t{{.Name}}\t{{.Events}}\t{{.LastRun.StartedAt.UnixNano}}\t{{.LastRun.Phase}}\t"
    '{{printf "%x" .Manifest}}{{end}}{{end}}'
)


@dataclass(frozen=True)
class Revision:
    """One revision of a release. `status` and `description` are helm's own; `chart` looks like `web-1.2.3`."""

    number: int
    status: str
    chart: str
    description: str
    at: datetime

    def __str__(self) -> str:
        """What it did, in words."""
        back = self.description.startswith(_ROLLED_BACK)
        what = (
            f"rolled back to revision {self.description.removeprefix(_ROLLED_BACK)}"
            if back
            else f"upgraded to {self.chart}"
        )
        at = self.at.astimezone(UTC)
        return f"{what} (revision {self.number}, {self.status}, {at:%Y-%m-%d %H:%M} UTC)"


@dataclass(frozen=True)
class Deployed(Revision):
    """A revision of a release, as helm stores it, by default the newest.

    `digest` is the SHA-256 of its manifests, `tests` are its chart's, by name. `run` is the id of the run of toto's
    that made it, or made what it was rolled back to; "" for what toto did not make, or an older version did.
    """

    digest: str
    tests: tuple[str, ...] = ()
    run: str = ""

    @property
    def pending(self) -> bool:
        """Whether a helm is working on it, or was killed while it did."""
        return self.status in _PENDING

    def made_by(self, run: str) -> bool:
        """Whether a run of toto's made it, or it is a rollback, which brings nothing new."""
        rolls_back = self.status == "pending-rollback" or self.description.startswith(("Rollback to ", 'Rollback "'))
        return rolls_back or (run != "" and self.run == run)


@dataclass(frozen=True)
class Hook:
    """A hook, and how helm last ran it: `phase` is helm's own word, such as `Succeeded`."""

    kind: str
    name: str
    events: str
    started: str
    phase: str
    manifest: str

    @property
    def is_test(self) -> bool:
        return not {"test", "test-success"}.isdisjoint(self.events.strip("[]").split())

    @property
    def identity(self) -> tuple[str, str, str]:
        """What it is from one run to the next."""
        return self.kind, self.name, self.manifest


@dataclass(frozen=True)
class Stored:
    """What helm stores of one revision. It contains secrets and must not leave `toto.helm`."""

    deployed: Deployed
    applies: str
    manifest: str
    hooks: tuple[Hook, ...]

    @property
    def text(self) -> str:
        """Everything that it brought, in helm's order."""
        return manifest.joined([self.manifest, *(hook.manifest for hook in self.hooks)])

    @cached_property
    def resources(self) -> dict[Key, Resource]:
        """The resources without the hooks."""
        return manifest.parse(self.manifest)

    @cached_property
    def everything(self) -> dict[Key, Resource]:
        return manifest.parse(self.text)

    @cached_property
    def masks(self) -> Masks:
        return diff.masks_of(list(self.everything.values()))

    @property
    def tests(self) -> dict[str, Hook]:
        """The tests of its chart, by the name that a person reads: with their kind where two have one name."""
        hooks = [hook for hook in self.hooks if hook.is_test]
        names = [hook.name for hook in hooks]
        found: dict[str, Hook] = {}
        for hook in hooks:
            name = f"{hook.kind} {hook.name}" if names.count(hook.name) > 1 else hook.name
            number = sum(each.partition(" (")[0] == name for each in found)
            found[f"{name} ({number + 1})" if number else name] = hook
        return found

    def passed(self, after: "Stored | None") -> set[str]:
        """Those of its tests that have run since, by helm's own status, and succeeded."""
        now = {id(one): other for one, other in zip(self.hooks, after.hooks if after else (), strict=False)}
        return {
            name
            for name, hook in self.tests.items()
            if (ran := now.get(id(hook))) is not None
            and ran.identity == hook.identity
            and ran.phase == "Succeeded"
            and ran.started != hook.started
        }


def template(major: int) -> str:
    """The template for `helm get all`, for helm of that major version; `read` reads what it gives."""
    return _TEMPLATE.replace("APPLIES", "{{.ApplyMethod}}" if major > 3 else "")


def read(output: str) -> Stored:
    number, status, chart, description, at, applies, run, text, *rest = output.split("\n")
    hooks = []
    for line in filter(None, rest):
        kind, name, events, started, phase, said = line.split("\t")
        hooks.append(Hook(kind, name, events, started, phase, _unhex(said)))
    deployed = Deployed(
        int(number),
        status,
        chart,
        _unhex(description),
        datetime.fromtimestamp(int(at), UTC),
        digest=hashlib.sha256(text.encode()).hexdigest(),
        run=_unhex(run),
    )
    stored = Stored(deployed, applies, _unhex(text), tuple(hooks))
    clean = stored.masks(deployed.description)
    return replace(stored, deployed=replace(deployed, description=clean, tests=tuple(stored.tests)))


def _unhex(digits: str) -> str:
    return bytes.fromhex(digits).decode(errors="replace")
