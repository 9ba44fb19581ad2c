"""The fleet's settings, `toto.toml` in the infra repo. Every setting has a default, so the file may be missing.

It holds no secrets and no settings of the server: those are in Prefect blocks and in the environment.
"""

import posixpath
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt, StrictStr, ValidationError

from toto.base.errors import InputError
from toto.base.model import Location, Model, explain, shown
from toto.infra_repo.fields import Distinct, Freeze, KeyName, Name, OpenIn, Word

FILE: Final = "toto.toml"
LARGEST: Final = 1 << 20  # bytes of a file

_LONG: Final = 20_000  # characters of a file: in a longer one no lines are looked for
_LOCATED: Final = 10  # mistakes whose lines are looked for, and lines that are tried for each
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_VENUE: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MAIL: Final = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")


class SettingsError(InputError):
    """The settings have mistakes. `problems` holds one line for each: `file: key: what`."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


def _check_nixpkgs(text: str) -> str:
    searched = re.fullmatch(r"<[A-Za-z0-9][A-Za-z0-9+._/-]*>|(npins|niv)#[A-Za-z0-9][A-Za-z0-9+._-]*", text)
    if not searched and (not re.fullmatch(r"[A-Za-z0-9._/][A-Za-z0-9+._/-]*", text) or ".." in text.split("/")):
        raise ValueError(
            f"should be like '<nixpkgs>', 'npins', or the path of an expression in the repo, not {shown(text)}"
        )
    return text


def _check_flake(value: object) -> object:
    if value is False:
        return False
    if not (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z0-9._][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*/?", value)
        and ".." not in value.split("/")
    ):
        raise ValueError(f"should be a folder in the repo like 'nixos', or false, not {shown(value)}")
    return posixpath.normpath(value)


def _check_in_repo(text: str) -> str:
    if text.startswith(("/", "-")) or ".." in text.split("/") or not text.strip("./ ") or _CONTROL.search(text):
        raise ValueError(f"should be a path in the repo, without '..', not {shown(text)}")
    return text


def _check_backend(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z_]\w*=[^\x00-\x1f\x7f]*", text) else _check_in_repo(text)


InRepo = Annotated[StrictStr, AfterValidator(_check_in_repo)]


def is_venue_name(text: str) -> bool:
    """Whether a venue, which is a Prefect block, can have this name."""
    return _VENUE.fullmatch(text) is not None


def is_mail_address(text: str) -> bool:
    """Whether `text` is one plain mail address."""
    return len(text) <= 254 and _MAIL.fullmatch(text) is not None


def _check_venue(text: str) -> str:
    if not is_venue_name(text):
        raise ValueError(f"should be a venue's name of lower-case letters, digits and '-', not {shown(text)}")
    return text


def _check_mail(text: str) -> str:
    if not is_mail_address(text if "@" in text else f"x@{text}"):
        raise ValueError(f"should be a mail address or a domain like 'example.org', not {shown(text)}")
    return text.lower()


def _check_path(text: str) -> str:
    return posixpath.normpath(_check_in_repo(text))


Seconds = Annotated[float, Field(strict=True, gt=0, le=7 * 86_400, allow_inf_nan=False)]
Megabytes = Annotated[StrictInt, Field(ge=64, le=16_777_216)]


class Tree(Model):
    """The files of a commit."""

    unfinished: tuple[Annotated[StrictStr, AfterValidator(_check_path)], ...] = ()
    """files and folders that nothing reads: they may be submodules, of git-lfs, links to nothing, or spelled twice"""


class Nix(Model):
    """Evaluation and builds."""

    flake: Annotated[str | Literal[False], BeforeValidator(_check_flake)] = "."
    """the folder of the flake.nix that names the hosts; `false`: the hosts are files, even beside a flake"""
    unlisted: StrictBool = False
    """whether hosts that machines.yaml does not list are rehearsed too; one that fails is a warning"""
    nixpkgs: Annotated[StrictStr, AfterValidator(_check_nixpkgs)] = "<nixpkgs>"
    """nixpkgs for hosts without a flake: a search path, an expression in the repo, `npins`, `niv`, or `npins#PIN`"""
    evaluate_timeout: Seconds = 600
    """seconds that the evaluation of one host may take"""
    evaluate_memory: Megabytes = 1700
    """MB that an evaluation takes, until it was measured: how many run side by side; with twice as much one is ended"""
    build_timeout: Seconds = 7200
    """seconds that a build may take"""
    signing_key: KeyName | None = None
    """the name of the repository's key on toto that signs closures; when left out, nothing is signed"""

    @property
    def most_memory(self) -> int:
        """The bytes that an evaluation may use."""
        return 2_000_000 * self.evaluate_memory


class Sandbox(Model):
    """Rehearsals."""

    memory: Megabytes | None = None
    """MB of memory of each sandbox; when left out, the host's VM decides"""
    boot_timeout: Seconds = 300
    """seconds until the host answers SSH"""
    test_timeout: Seconds = 300
    """seconds that one test script may take"""
    phase_timeout: Seconds = 1800
    """seconds that all test scripts of a phase may take"""
    test_output: Annotated[StrictInt, Field(ge=1000, le=1_000_000_000)] = 1_000_000
    """bytes that are kept of the output of one test script"""


class RollOut(Model):
    """What touches machines."""

    method: Literal["toto", "nixos-rebuild"] = "toto"
    """`toto` activates under a watchdog on the machine, `nixos-rebuild` leaves activation to nixos-rebuild"""
    policy: Literal["all", "partial"] = "all"
    """`all`: nothing is rolled out when one host fails its rehearsal; `partial`: the others are rolled out"""
    confirm_timeout: Seconds = 120
    """seconds until the machine's watchdog reverts it, if toto does not confirm"""
    activation_timeout: Seconds = 600
    """seconds that an activation may take"""
    connect_timeout: Seconds = 15
    """seconds until a machine that does not answer is unreachable"""
    check_address: StrictBool = False
    """`true`: the address of the manifest must be one that the new configuration sets itself"""
    freeze: Freeze = False
    """`true` or a reason: nothing is rolled out, everything is rehearsed"""
    window: OpenIn | None = None
    """when anything may be rolled out, like `Sat-Sun 22:00-06:00`; when left out, always"""
    compliance: Literal["none", "gate"] = "none"
    """`gate`: a control of impact 0.7 or more that fails, in the sandbox or after the switch, fails the roll-out"""


class ComplianceCheck(Model):
    """An InSpec profile or a module of pytest-testinfra."""

    tags: Annotated[tuple[Word, ...], Distinct] = ()
    """only machines with one of these tags are checked by it; when left out, all"""
    controls: Annotated[tuple[Word, ...], Distinct] = ()
    """the ids of the controls that are run, for a module the names of its tests; when left out, all"""


class Compliance(Model):
    """The checks in `inspec/` and `compliance/`."""

    tags: Annotated[tuple[Word, ...], Distinct] = ()
    """machines with one of these tags are checked; when left out, all"""
    timeout: Seconds = 600
    """seconds that a profile, or all modules together, may take on one machine"""
    checks: dict[Name, ComplianceCheck] = Field(default_factory=dict)
    """the profiles and modules by name that are for some machines, or of which some controls are run"""


Prevent = Annotated[tuple[Literal["destroy", "replace"], ...], Distinct]
Approve = Literal["never", "destroy", "always"]


class TerraformRoot(Model):
    """A root module of terraform."""

    path: InRepo | None = None
    """its folder in the repo; when left out, `terraform/NAME`"""
    workspace: Name = "default"
    """the workspace that it is deployed to; it is created when missing"""
    var_files: Annotated[tuple[InRepo, ...], Distinct] = ()
    """files of variables, as paths in the repo; later ones win"""
    backend_config: Annotated[tuple[Annotated[StrictStr, AfterValidator(_check_backend)], ...], Distinct] = ()
    """what its backend block leaves out: files, as paths in the repo, or `key=value`; no secrets"""
    after: Annotated[tuple[Name, ...], Distinct] = ()
    """roots that are applied before this one"""
    tags: Annotated[tuple[Word, ...], Distinct] = ()
    """words to select roots by"""
    watch: Annotated[tuple[InRepo, ...], Distinct] = ()
    """more files and folders of the repo that it reads; a change to them plans it again"""
    was: Name | None = None
    """the name that it had before, whose state it goes on with; its own name: it begins anew at another place"""
    prevent: Prevent | None = None
    """as `terraform.prevent`, for this root alone"""
    approve: Approve | None = None
    """as `terraform.approve`, for this root alone"""


class Terraform(Model):
    """Terraform's root modules."""

    timeout: Seconds = 3600
    """seconds that one terraform command may take"""
    lock_timeout: Seconds = 300
    """seconds to wait for a state that someone else has locked"""
    prevent: Prevent = ()
    """what no plan may do: `destroy` (a replacement destroys too), or only `replace`"""
    approve: Approve = "never"
    """which plans wait for a person's approval: none (`never`), those that `destroy` or replace, or all (`always`)"""
    approve_timeout: Seconds = 3600
    """seconds to wait for an approval"""
    roots: dict[Name, TerraformRoot] = Field(default_factory=dict)
    """the roots by name, none for `{}`; when left out, `terraform/`, or else each folder in it with `.tf` files"""

    @property
    def named(self) -> dict[str, TerraformRoot] | None:
        """The roots by name, where the file names them; else None."""
        return self.roots if "roots" in self.model_fields_set else None


class Jobs(Model):
    """Jobs that toto runs."""

    path: InRepo = "jobs"
    """their folder in the repo; laminar's own `cfg` will do"""


class Venues(Model):
    """Who is notified of a run. The address and the secret of a venue are in the Prefect block of its name."""

    fleet: tuple[Annotated[StrictStr, AfterValidator(_check_venue)], ...] = ()
    """names of the venues that are notified of every target: failures, what was deployed, what works again"""
    mail_pusher: tuple[Annotated[StrictStr, AfterValidator(_check_mail)], ...] = ()
    """addresses and domains: the committer of a pushed commit gets a mail with the result if they are listed here"""
    notes: StrictBool = True
    """whether a result is also written as a git note of its commit, in `refs/notes/toto`"""


class Settings(Model):
    """Everything in `toto.toml`."""

    tree: Tree = Tree()
    nix: Nix = Nix()
    sandbox: Sandbox = Sandbox()
    roll_out: RollOut = RollOut()
    compliance: Compliance = Compliance()
    terraform: Terraform = Terraform()
    jobs: Jobs = Jobs()
    venues: Venues = Venues()


def load(tree: Path, *, deployed: bool = False) -> Settings:
    """The settings of an infra repo checked out at `tree`; the defaults when it has no `toto.toml`.

    With `deployed` they are of a commit that was deployed already, perhaps by an older version, and that toto has to
    understand in order to revert: a value that only older versions accept counts as left out.
    Raises `SettingsError` with all mistakes, or with the line that is not TOML.
    """
    text = _read(tree / FILE)
    data = _toml(text)
    if deployed and isinstance(nix := data.get("nix"), dict) and "/" in str(nix.get("signing_key")):
        del nix["signing_key"]  # version 0.1.0's path of a key file
    if deployed and isinstance(roots := data.get("terraform"), dict) and roots.get("roots") == {}:
        del roots["roots"]  # in version 0.1.0 the same as left out
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise SettingsError(
            [
                problem(location, what, line_of(text, location) if number < _LOCATED else None)
                for number, (location, what) in enumerate(explain(error, Settings))
            ]
        ) from None


def problem(location: Location, what: str, line: int | None = None) -> str:
    """One line of a `SettingsError`: what is wrong with the setting at `location`, and in which line it is."""
    where = FILE if line is None else f"{FILE}:{line}"
    return f"{where}: {'.'.join(_key(part) for part in location if part != '[key]')}: {what}"


def line_of(text: str, location: Location) -> int | None:
    """The line that sets `location`, when that is one line: the file has it with this line, and not without it."""
    path = [part for part in location if part != "[key]"]
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    word = re.compile(rf"(?<![\w-]){re.escape(key)}(?![\w-])")
    lines = text.split("\n") if len(text) < _LONG else []
    for number in [each for each, line in enumerate(lines) if word.search(line)][:_LOCATED]:
        try:
            before, after = (tomllib.loads("\n".join(lines[:end])) for end in (number, number + 1))
        except (ValueError, RecursionError):  # (a value of several lines)
            continue
        if _has(after, path) and not _has(before, path):
            return number + 1
    return None


def _has(data: Any, path: Sequence[str | int]) -> bool:
    for part in path:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise SettingsError([f"{FILE}: this is not a file"])
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise SettingsError([f"{FILE}: cannot be read: {error.strerror}"]) from None
    if len(data) > LARGEST:
        raise SettingsError([f"{FILE}: is larger than {LARGEST >> 20} MiB"])
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SettingsError([f"{FILE}:{line}: is not UTF-8 from here on"]) from None


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise SettingsError([f"{FILE}: is nested too deeply"]) from None
    except ValueError as error:
        # A TOMLDecodeError, or what Python's int() raises for a number that is too long.
        found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
        line = (int(found[2]) if found[2] else text.count("\n") + 1) if found else 1
        what = " ".join((found[1] if found else str(error)).split())
        raise SettingsError([f"{FILE}:{line}: is not TOML: {what[:1].lower()}{what[1:]}"]) from None


def _key(part: str | int) -> str:
    return part if isinstance(part, str) and re.fullmatch(r"[A-Za-z0-9_-]+", part) else shown(part)
