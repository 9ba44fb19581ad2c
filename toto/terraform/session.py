"""Terraform: finds the root modules of the infra repo, computes their identities, and plans and applies one of them.

A root is planned into a file, and toto applies exactly that file. python-terraform builds the command lines and
`toto.base.process` runs them in cells; it sends SIGINT first, on which terraform saves its state and unlocks it.
`toto.terraform.plan` reads what a plan says. Toto waits for state locks and reports them; it never breaks one.

Configurations, providers and provisioners are programs of whoever pushes. Their cell sees the commit's files, and
writes to a copy of the root's folder, to the run's data, to the root's own state and to the repo's cache of providers.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

import python_terraform  # type: ignore[import-untyped]

from toto.base import files, paths, process
from toto.base.after import in_order
from toto.base.errors import InputError, TotoError
from toto.base.model import Model, shown
from toto.base.process import CommandTimeout, Completed, LineSink
from toto.cell import folders, tool
from toto.cell.cell import Cell
from toto.cell.namespace import Namespace
from toto.cell.relay import Endpoint
from toto.infra_repo import fields, git
from toto.infra_repo.settings import Approve, Prevent, SettingsError, Terraform, TerraformRoot, problem
from toto.terraform import endpoints as backends
from toto.terraform import hcl
from toto.terraform import plan as tfplan
from toto.terraform.plan import Planned, State

FOLDER: Final = "terraform"
OVERRIDE: Final = "toto_override.tf.json"  # terraform merges files with such a name over the others
BACK: Final = "toto_way_back.tf.json"
GRACE: Final = 60.0  # seconds that an interrupted terraform has to save the state and unlock it
MOST_FOLDERS: Final = 10_000  # in which toto looks for roots
LARGEST: Final = 256_000_000  # bytes of a state or a plan, as JSON
SHORTEST: Final = 4  # characters of a secret that is masked; masking shorter ones would leave nothing readable

# Places in a cell. They are the same in every run, since a configuration may use its own path.
REPO: Final = Path("/repo")  # the commit's files, read-only but for the root's folder
STATE: Final = Path("/state")  # the state of a root without a backend
_DATA: Final = Path("/data")
_PROVIDERS: Final = Path("/providers")
_PLACE: Final = (  # what says where a backend keeps a state; none of it is a secret
    ("bucket", "container_name", "prefix", "key", "schema_name", "path", "namespace", "secret_suffix", "hostname")
)
_ONCE: Final = ("moved", "import", "removed")  # blocks that say what is done once
_CELL: Final = "@cell"  # the end of the holder's name in a lock that a terraform in a cell holds

Standing: TypeAlias = Literal["deploys", "reads", "guest"]
"""what a run may have: credentials and the state; credentials that only read, and a copy of the state; or neither"""

P = ParamSpec("P")
T = TypeVar("T")
# Its constructor reads the state in the working directory; this one has none.
_COMMANDS: Final = python_terraform.Terraform(working_dir=os.devnull)
_FLAG: Final = python_terraform.IsFlagged
_LOCK: Final = re.compile(r"^ +(ID|Operation|Who|Created): +(.*?) *$", re.MULTILINE)
_POSITION: Final = re.compile(r"\bon (\S.*) line (\d+)")


class TerraformFailed(TotoError):
    """A terraform command failed. The message is terraform's own errors, with positions as paths in the repo.

    `killed` means that a signal ended it, so nobody knows how far it got.
    """

    def __init__(self, message: str, *, target: str, hint: str | None = None, killed: bool = False) -> None:
        super().__init__(message, target=target, hint=hint)
        self.killed = killed


class StateLocked(TerraformFailed):
    """A different terraform held the lock of the state for as long as toto waited (`waited`, in seconds).

    `holder` is what the lock says about it (ID, Operation, Who, Created); empty when the backend does not say.
    """

    def __init__(self, holder: Mapping[str, str], *, target: str, waited: float) -> None:
        who, since, what, lock = (holder.get(key, "unknown") for key in ("Who", "Created", "Operation", "ID"))
        by = f"{who} since {since} ({what}, lock {lock})" if holder else "someone: the backend does not say who"
        unlock = f"; if it is dead, `terraform force-unlock {lock}`" if holder else ""
        super().__init__(
            f"its state is locked by {by}; waited {waited:g} s",
            target=target,
            hint=f"wait until that terraform is done{unlock}",
        )
        self.holder = dict(holder)


class PlanStale(TerraformFailed):
    """The state has changed since the plan was made; nothing was applied."""


class ApplyFailed(TerraformFailed):
    """A plan was not applied, or only in part. `partial` is False only when it is certain that nothing was changed."""

    def __init__(self, message: str, *, partial: bool, target: str, hint: str | None = None) -> None:
        super().__init__(message, target=target, hint=hint)
        self.partial = partial


class Root(Model):
    """A root module. `path` is its folder in the repo; the other fields are those of `toto.toml`, with defaults."""

    name: str
    path: str
    workspace: str = "default"
    var_files: tuple[str, ...] = ()
    backend_config: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    watch: tuple[str, ...] = ()
    was: str | None = None
    prevent: Prevent = ()
    approve: Approve = "never"

    @property
    def label(self) -> str:
        return f"terraform/{self.name}"

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it reads besides its own folder and the modules that it calls, as paths in the repo."""
        return *self.var_files, *(each for each in self.backend_config if "=" not in each), *self.watch


def discover(tree: Path, settings: Terraform) -> list[Root]:
    """The roots of a commit, in an order in which each comes after the roots in its `after`.

    Raises `SettingsError` when a setting names a file or a root that does not exist, and when `after` has a circle.
    """
    named = settings.named
    if named is None:
        named = {name: TerraformRoot(path=path) for name, path in _found(tree)}
    roots = {
        name: Root(
            name=name,
            **each.model_dump(exclude={"path", "prevent", "approve"}),
            path=each.path or f"{FOLDER}/{name}",
            prevent=settings.prevent if each.prevent is None else each.prevent,
            approve=each.approve or settings.approve,
        )
        for name, each in named.items()
    }
    if problems := list(_problems(tree, roots)):
        raise SettingsError(problems)
    order, circles = in_order({name: root.after for name, root in roots.items()})
    if circles:
        raise SettingsError([problem(("terraform", "roots", each.name, "after"), str(each)) for each in circles])
    return [roots[name] for name in order]


def _found(tree: Path) -> Iterator[tuple[str, str]]:
    folder = tree / FOLDER
    if _configuration(folder):
        yield "main", FOLDER
        return
    called = _modules(tree)
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if _may_be_root(entry) and entry.resolve() not in called:
            place = f"{FOLDER}/{entry.name}"
            yield (
                fields.require_name(entry.name, "a root's name", place, hint="rename it, or name it in toto.toml"),
                place,
            )


def _may_be_root(folder: Path) -> bool:
    return not folder.name.startswith(".") and not folder.is_symlink() and bool(_configuration(folder))


def _modules(tree: Path) -> dict[Path, str]:
    """The folders in `terraform/` that another one there calls as a module, each with the first that does."""
    found: dict[Path, str] = {}
    inside = tree.resolve()
    for folder in _configured(tree):
        with suppress(InputError):  # of a module that is not in the repo: its root says so
            for module in _called(inside, folder.resolve()):
                if module != folder.resolve():
                    found.setdefault(module, str(folder.relative_to(tree)))
    return found


def _configured(tree: Path) -> Iterator[Path]:
    """The folders in `terraform/`, however deep, that have `.tf` files; in the first `MOST_FOLDERS` folders."""
    for number, (name, inside, _) in enumerate(os.walk(tree / FOLDER)):
        if number == MOST_FOLDERS:
            return
        inside[:] = sorted(each for each in inside if not each.startswith("."))
        if _configuration(Path(name)):
            yield Path(name)


def left_aside(tree: Path, settings: Terraform, roots: Sequence[Root]) -> Iterator[tuple[str, str]]:
    """The folders in `terraform/` that look like roots and are none, each with why, and the setting that changes it.

    Where the settings name the roots, the others were left out on purpose.
    """
    if settings.named is not None:
        if not settings.named and any(_configured(tree)):
            yield FOLDER, "terraform is off, by `[terraform] roots = {}` in toto.toml: remove that to have roots found"
        return
    called, places = _modules(tree), {root.path for root in roots}
    for folder in _configured(tree):
        place, by = str(folder.relative_to(tree)), called.get(folder.resolve())
        if place in places or (by and (FOLDER in places or folder.parent != tree / FOLDER)):
            continue  # (a module where modules usually are)
        why = f"{by} calls it as a module" if by else "only folders directly in it are, if it has no .tf files itself"
        word = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip(".-") or "name"
        yield (
            shown(place) if not place.isprintable() else place,
            f"is no root, since {why}: name all roots in toto.toml, this one by "
            f"[terraform.roots.{json.dumps(word) if '.' in word else word}] with path = {shown(place)}",
        )


def _problems(tree: Path, roots: Mapping[str, Root]) -> Iterator[str]:
    for name, root in roots.items():
        where = ("terraform", "roots", name)
        if not _configuration(tree / root.path):
            yield problem((*where, "path"), f"there are no .tf files in {shown(root.path)}")
        for file in root.files:
            if not (tree / file).exists():
                key = "var_files" if file in root.var_files else "watch" if file in root.watch else "backend_config"
                yield problem((*where, key), f"there is no {shown(file)} in the repo")
        for other in root.after:
            if other not in roots:
                yield problem((*where, "after"), f"there is no root {shown(other)}")
        if root.was != name and root.was in roots:
            yield problem((*where, "was"), f"there is still a root {shown(root.was)}, whose state that is")
        if root.was not in (None, name) and any(root.was == each.was for each in roots.values() if each is not root):
            yield problem((*where, "was"), f"two roots cannot go on with the state of {shown(root.was)}")


def _configuration(folder: Path) -> list[Path]:
    """The files of a module: those in its folder that terraform reads."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith((".tf", ".tf.json")) and not path.name.startswith(".") and path.is_file()
    )


async def identity(repo: Path, commit: str, tree: Path, root: Root) -> str:
    """The hash (SHA-256, hex) of a root's files in git and its settings; it changes when the root's effect may change.

    Its files are its folder, the local modules that it calls (and those that they call), the targets of links in
    them, and the root's `files`. Raises `InputError`, with file and line, for a module that is not in the repo.
    """
    names = sorted(_dependencies(tree.resolve(), root))
    ids = await git.git(repo, "rev-parse", *(f"{commit}:{name}" for name in names))
    parts = (root.path, root.workspace, root.var_files, root.backend_config, list(zip(names, ids.lines, strict=True)))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _dependencies(tree: Path, root: Root) -> set[str]:
    modules, folders = set[Path](), [(tree / root.path).resolve()]
    while folders:
        if (folder := folders.pop()) not in modules:
            modules.add(folder)
            folders += _called(tree, folder)
    found = modules | {(tree / name).resolve() for name in root.files}
    for folder in [path for path in found if path.is_dir()]:
        links = (path.resolve() for path in folder.rglob("*") if path.is_symlink())
        found |= {path for path in links if path.is_relative_to(tree) and path.exists()}
    return {str(path.relative_to(tree)) for path in found}


def _called(tree: Path, folder: Path) -> Iterator[Path]:
    """The folders of the local modules that a module calls."""
    for file in _configuration(folder):
        text = file.read_text(errors="replace")
        for module in (hcl.json_modules if file.suffix == ".json" else hcl.modules)(text):
            if not module.source.startswith(("./", "../", "/")):
                continue  # from a registry or a different repo, pinned by its version
            target = (folder / module.source).resolve()
            if not target.is_relative_to(tree) or not target.is_dir():
                wrong = "is not a folder" if target.is_relative_to(tree) else "is not in the repo"
                raise InputError(
                    f"the source of module {shown(module.name)} {wrong}: {shown(module.source)}",
                    target=f"{file.relative_to(tree)}:{module.line}",
                    hint="fix the path and push again",
                )
            yield target


def _connected(
    method: "Callable[Concatenate[Session, P], Awaitable[T]]",
) -> "Callable[Concatenate[Session, P], Coroutine[Any, Any, T]]":
    """Have a method's cells share one network, which ends with it."""

    @wraps(method)
    async def connected(self: "Session", /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self.network is not None:
            return await method(self, *args, **kwargs)
        user = self._ready()
        async with tool.internet([*self.endpoints, *backends.of_backends(self.env)], user=user) as network:
            return await method(replace(self, network=network), *args, **kwargs)

    return connected


@dataclass(frozen=True)
class Session:
    """Terraform for one root of an exported commit, `tree`.

    `scratch` is the run's own directory: it holds the plans, which contain secrets, and what terraform downloads. A
    root without a backend keeps its state in toto's state directory for `repo`. `env` are the secrets that terraform
    gets (`TF_VAR_…`, `AWS_…`); they are masked in all of its output, also in what `on_line` gets. `endpoints` are what
    it reaches besides the internet and the backend that `env` names. `standing` says whether its plan may be applied:
    one that may not leaves nothing behind, neither in the state nor in the cache of providers.
    """

    repo: Path
    root: Root
    tree: Path
    scratch: Path
    settings: Terraform
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    on_line: LineSink | None = None
    endpoints: Sequence[Endpoint] = ()
    standing: Standing = "deploys"
    network: Namespace | None = None

    @_connected
    async def plan(self, *, back: str | None = None, destroy: bool = False, only: Sequence[str] = ()) -> Planned:
        """Make the root ready (see `init`, also for `back`) and plan it.

        With `destroy`, the plan destroys all of it, or `only` the resources of these addresses, and what depends on
        them. Raises `TerraformFailed` (also as `StateLocked`), `InputError`, `CommandTimeout`.
        """
        await self.init(back)
        handle, name = tempfile.mkstemp(suffix=".tfplan", dir=self._data)  # terraform keeps the mode, 0600
        if (user := self._user) is not None:
            os.fchown(handle, user, user)
        os.close(handle)
        inside = _DATA / Path(name).name
        done = await self._run(
            "plan",
            ok=(0, 2),
            out=inside,
            detailed_exitcode=_FLAG,
            **self._locking,
            destroy=_FLAG if destroy else None,
            target=list(only) or None,
            var_file=[str(REPO / file) for file in self.root.var_files],
        )
        document = json.loads((await self._run("show", inside, private=True, json=_FLAG)).stdout)
        # The state is read last: if it changes in between, the plan is stale, and terraform refuses to apply it.
        before = await self.state()
        entries = document.get("resource_changes", ())
        return Planned(
            root=self.root.name,
            file=Path(name),
            before=before,
            empty=done.status == 0,
            terraform=document["terraform_version"],
            changes=tfplan.changes_of(entries, self._secrets),
            outputs=tfplan.outputs_of(document.get("output_changes", {}), self._secrets),
            drift=tfplan.changes_of(document.get("resource_drift", ()), self._secrets),
            deeds=tfplan.deeds_of(entries, before, self._secrets),
            place=self.place,
        )

    @_connected
    async def apply(self, planned: Planned) -> State:
        """Apply exactly a saved plan of this session's tree and scratch; return the state that it leaves.

        On a cancel, terraform finishes its current operation, saves its state and unlocks it.
        Raises `PlanStale` or `StateLocked` (nothing was done), or `ApplyFailed`.
        """
        try:
            await self._run("apply", _DATA / planned.file.name, **self._locking)
        except (PlanStale, StateLocked):
            raise
        except (TerraformFailed, CommandTimeout) as error:
            raise await self._apply_failed(planned, error) from None
        finally:
            self._rescue()
        return await self.state()

    @_connected
    async def forget(self, addresses: Sequence[str]) -> State:
        """Take resources out of the state, and leave them in the world. Call `plan` or `init` first.

        Raises `TerraformFailed` (also as `StateLocked`), `CommandTimeout`.
        """
        await self._run("state rm", *addresses, **self._locking)
        return await self.state()

    @_connected
    async def state(self) -> State:
        """The state as it is now. Call `plan` or `init` first. Raises `TerraformFailed`, `CommandTimeout`."""
        text = (await self._run("state pull", private=True)).stdout
        return tfplan.state_of(json.loads(text) if text.strip() else None, self._secrets)

    @_connected
    async def validate(self) -> None:
        """Check what the root says by itself, without its state. Raises `TerraformFailed`, `CommandTimeout`."""
        with suppress(OSError):
            (self._data / "terraform.tfstate").unlink()  # else terraform asks the backend all the same
        try:
            await self._run("init", backend=False)
        except TerraformFailed:  # of a module or a provider that only a login can fetch
            return
        await self._run("validate")

    @_connected
    async def init(self, back: str | None = None) -> None:
        """Make the root ready: a fresh copy of its folder, backend, providers, modules, workspace.

        For a way back, `back` is the text of a `.tf.json` file that takes the place of what the copy itself moves,
        imports and forgets: all that was done once, and terraform refuses a second block about the same resource.
        Only one session at a time does this, because a repo's roots share one cache of providers. Raises `InputError`
        for a state that would be lost with the tree, `TerraformFailed`, `CommandTimeout`.
        """
        override, marker = self._copy / OVERRIDE, self._data / "terraform.tfstate"
        async with paths.alone(self._providers.with_suffix(".lock")):
            if self._copy.exists():
                shutil.rmtree(self._copy)
            shutil.copytree(self._folder, self._copy, symlinks=True)
            if back is not None:
                self._turn_back(back)
            folders.own(self._copy, self._user)
            with suppress(OSError):
                marker.unlink()  # of an earlier tree's backend
            await self._init(*(each if "=" in each else REPO / each for each in self.root.backend_config))
            if (told := folders.read_regular(self._data, marker.name, most=LARGEST)) is not None:
                self._check_backend(told)
            else:
                self._check_no_state_beside()
                files.write(override, '{"terraform": {"backend": {"local": {}}}}\n', 0o644)
                await self._init(f"path={STATE}/terraform.tfstate", f"workspace_dir={STATE}/workspaces")
        if self.root.workspace != "default":
            await self._run("workspace select", self.root.workspace, or_create=_FLAG)
        for file in sorted(self._home.glob("errored-*.tfstate")):
            await self._save_late(file)

    def _turn_back(self, blocks: str) -> None:
        inside = self.tree.resolve()
        for place, _, names in os.walk(self._folder):
            for file in (Path(place, name) for name in names if name.endswith((".tf", ".tf.json"))):
                if not file.is_file() or not file.resolve().is_relative_to(inside):
                    continue
                with suppress(UnicodeDecodeError):  # terraform refuses it
                    text = file.read_bytes().decode()
                    rest = (hcl.json_without if file.suffix == ".json" else hcl.without)(text, _ONCE)
                    if rest != text:
                        files.write(self._copy / file.relative_to(self._folder), rest, 0o644)
        if blocks != "{}":
            files.write(self._copy / BACK, blocks, 0o644)

    async def _init(self, *backend_config: str | Path) -> None:
        await self._run("init", reconfigure=_FLAG, backend_config=list(backend_config))

    def _check_backend(self, told: bytes) -> None:
        try:
            kind = json.loads(told)["backend"]["type"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise TerraformFailed("`terraform init` left no settings of its backend", target=self.root.label) from None
        if kind == "local":
            raise InputError(
                "its backend keeps the state in a file of its own, where terraform does not reach it from its cell",
                target=self.root.label,
                hint=f"leave the backend block out, and toto keeps the state in {self._kept}/terraform.tfstate (move "
                "it there, if there is one); or use a different backend",
            )

    @property
    def place(self) -> str:
        """Where the state is, in words without secrets. Call `init` first."""
        told = folders.read_regular(self._data, "terraform.tfstate", most=LARGEST)
        where = f'toto\'s own state "{self.root.was or self.root.name}"'
        with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            if told is not None and (backend := json.loads(told)["backend"])["type"] != "local":
                parts = [f"{key} {backend['config'][key]}" for key in _PLACE if backend["config"].get(key)]
                where = ", ".join([f"backend {backend['type']}", *parts])
        where = process.shorten(process.mask(where, self._secrets), tfplan.LONGEST)
        return where if self.root.workspace == "default" else f"{where}, workspace {self.root.workspace}"

    def _check_no_state_beside(self) -> None:
        kept = self._kept / "terraform.tfstate"
        if (self._folder / "terraform.tfstate").exists() and not kept.exists():
            raise InputError(
                "a state is committed beside the configuration, and toto keeps this root's elsewhere",
                target=self.root.label,
                hint=f"move {self.root.path}/terraform.tfstate to {kept}",
            )

    async def _apply_failed(self, planned: Planned, error: TerraformFailed | CommandTimeout) -> ApplyFailed:
        unsaved = self._rescue()
        try:
            moved = await self.state() != planned.before
        except TotoError:
            moved = True
        # A terraform that was killed may have created resources that are not in the state.
        partial = moved or unsaved is not None or isinstance(error, CommandTimeout) or error.killed
        hint = (
            "a part of the plan may have been applied: the next plan shows what is left to do"
            if partial
            else "nothing was changed; fix the cause and push again"
        )
        if unsaved is not None:
            hint = f"terraform could not save the state: toto keeps it in {unsaved}, and the next run saves it first"
        return ApplyFailed(error.message, partial=partial, target=self.root.label, hint=hint)

    async def _save_late(self, file: Path) -> None:
        """Save a state that an earlier apply could not save. Terraform refuses when the state has changed since."""
        try:
            await self._run("state push", STATE / file.name, **self._locking)
        except StateLocked:
            raise
        except TerraformFailed as error:
            raise TerraformFailed(
                f"the state lacks what an earlier apply did: {error.message}",
                target=self.root.label,
                hint=f"compare the state with {file}, which that apply left; remove the file when the state is right",
            ) from None
        file.unlink()

    def _rescue(self) -> Path | None:
        """Move a state that terraform could not save out of the copy of the folder, which is deleted with the run."""
        left = self._copy / "errored.tfstate"
        state = folders.read_regular(self._copy, left.name, most=LARGEST)
        if state is None:
            return None
        kept = files.write_bytes(self._home / f"errored-{git.now()}.tfstate", state)
        folders.own(self._home, self._user)
        left.unlink()
        return kept

    async def _run(
        self, command: str, *arguments: str | Path, ok: Collection[int] = (0,), private: bool = False, **options: Any
    ) -> Completed:
        """Run a terraform command. The output of a `private` one holds secrets, and only toto reads it.

        Raises `TerraformFailed` or a subclass when the exit status is not in `ok`, and `CommandTimeout`.
        """
        _, *words = _COMMANDS.generate_cmd_string(command, *map(str, arguments), no_color=_FLAG, **options)
        terraform = await tool.tool("terraform")
        sink = None if private else self.on_line
        began = datetime.now(UTC)
        try:
            done = await process.run(
                [terraform.program, *words],
                cell=self._cell(terraform),
                env=self._environment(terraform),
                cwd=REPO / self._place,
                check=False,
                on_line=sink,
                on_error_line=sink,
                secrets=() if private else self._secrets,
                keep=LARGEST if private else process.KEPT,
                grace=GRACE,
                timeout=self.settings.timeout + self.settings.lock_timeout,
                target=self.root.label,
                signals=(signal.SIGINT, signal.SIGTERM),
            )
        except CommandTimeout as error:
            raise CommandTimeout(
                error.argv, error.seconds, "" if private else error.tail, target=self.root.label
            ) from None
        if done.status not in ok:
            raise self._failed(done, began)
        if private and done.truncated:
            raise TerraformFailed(f"`terraform {command}` printed more than {LARGEST} bytes", target=self.root.label)
        return done

    def _failed(self, done: Completed, began: datetime) -> TerraformFailed:
        said = process.mask(done.stderr, self._secrets)
        if "Error acquiring the state lock" in said:
            holder = dict(_LOCK.findall(said))
            # Some backends (pg) do not know who holds a lock; terraform then prints what it would have written itself.
            ours = holder.get("Who", "").endswith(_CELL)
            if ours and holder.get("Created", "") >= began.strftime("%Y-%m-%d %H:%M:%S.%f"):
                holder = {}
            return StateLocked(holder, target=self.root.label, waited=self.settings.lock_timeout)
        if re.search(r"Saved plan (is stale|does not match)", said):
            return PlanStale(
                "the state has changed since the plan was made", target=self.root.label, hint="plan it again"
            )
        text = self._in_repo(_errors(said)) or f"`{process.shorten(' '.join(done.argv))}` printed no error"
        if done.status < 0:
            text = f"terraform was ended by {signal.Signals(-done.status).name}\n{text}"
        return TerraformFailed(text, target=self.root.label, killed=done.status < 0)

    def _in_repo(self, text: str) -> str:
        """Terraform's text, with positions as paths in the repo instead of the root's folder."""

        def ours(found: re.Match[str]) -> str:
            name = os.path.normpath(f"{self.root.path}/{found[1]}")
            inside = not name.startswith(("/", "..")) and (self.tree / name).exists()
            return f"on {name} line {found[2]}" if inside else found[0]

        return _POSITION.sub(ours, text)

    @cached_property
    def _secrets(self) -> tuple[str, ...]:
        return tuple(_spellings(self.env.values()))

    @property
    def _place(self) -> Path:
        """The root's folder, as a path in the repo without links."""
        return self._folder.resolve().relative_to(self.tree.resolve())

    @property
    def _folder(self) -> Path:
        return self.tree / self.root.path

    @property
    def _kept(self) -> Path:
        """The files of this root that outlive a run."""
        return paths.repo_state(self.repo) / "terraform" / (self.root.was or self.root.name)

    @property
    def _home(self) -> Path:
        """What the cell sees of them: themselves, or a folder of the run for a plan that may not be applied."""
        return self._kept if self.standing == "deploys" else self._own / "state"

    @property
    def _own(self) -> Path:
        """The files that are deleted after the run. Each run has its own, so two runs may plan a root at once."""
        return self.scratch / "terraform" / self.root.name / self.root.workspace

    @property
    def _data(self) -> Path:
        """Plans, and what terraform remembers and downloads for this root."""
        return self._own / "data"

    @property
    def _copy(self) -> Path:
        """A copy of the root's folder, in which terraform and the configuration may write."""
        return self._own / "folder"

    @property
    def _providers(self) -> Path:
        """The cache of providers. All that deploys this repo writes to it, so no other plan and no other repo may."""
        return (
            paths.repo_state(self.repo) / "terraform-providers"
            if self.standing == "deploys"
            else self._own / "providers"
        )

    @property
    def _user(self) -> int | None:
        """The user of the cells: one for all that deploys this repo, since they share a state; else the run's own."""
        return folders.user_of(self._providers)

    def _ready(self) -> int | None:
        """Make the folders that a cell writes to, and return the cells' user, whose they are."""
        user = folders.shared(self._providers)
        for folder in (self._home, self._data):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folders.own(self._data, user)
        if self.standing == "reads":
            self._copy_state()
        folders.own(self._home, user)
        return user

    def _copy_state(self) -> None:
        within = () if self.root.workspace == "default" else ("workspaces", self.root.workspace)
        state = folders.read_regular(self._kept, *within, "terraform.tfstate", most=LARGEST)
        if state is not None:
            place = self._home.joinpath(*within)
            place.mkdir(parents=True, exist_ok=True)
            files.write_bytes(place / "terraform.tfstate", state)

    def _cell(self, terraform: tool.Tool) -> Cell:
        return Cell(
            read={**terraform.read, **_configuration_file(), REPO: self.tree},
            write={REPO / self._place: self._copy, STATE: self._home, _DATA: self._data, _PROVIDERS: self._providers},
            store=terraform.store,
            network=self.network,
            limits=tool.limits(),
            user=self._user,
        )

    @property
    def _locking(self) -> dict[str, Any]:
        """How a command locks the state; credentials that only read cannot."""
        return {"lock": False} if self.standing == "reads" else {"lock_timeout": f"{self.settings.lock_timeout:.3f}s"}

    def _environment(self, terraform: tool.Tool) -> dict[str, str]:
        configured = [("TF_CLI_CONFIG_FILE", str(file)) for file in _configuration_file()]
        return {
            **terraform.env,
            **dict(configured),
            **self.env,
            "TF_IN_AUTOMATION": "1",
            "TF_INPUT": "0",
            "CHECKPOINT_DISABLE": "1",
            "TF_DATA_DIR": str(_DATA),
            "TF_PLUGIN_CACHE_DIR": str(_PROVIDERS),
            # Without a lock file in the repo every run would download its providers again.
            "TF_PLUGIN_CACHE_MAY_BREAK_DEPENDENCY_LOCK_FILE": "1",
        }


def _configuration_file() -> dict[Path, Path]:
    """Terraform's own configuration on this server, as a mount; none where there is none.

    Raises `InputError` when it has credentials: whatever is pushed would read them.
    """
    file = Path(os.environ.get("TF_CLI_CONFIG_FILE", ""))
    if not file.is_file():  # terraform warns of a missing one each time
        return {}
    if re.search(r"^\s*credentials", file.read_text(errors="replace"), re.MULTILINE):
        raise InputError(
            "it has credentials, and whatever is pushed reads this file",
            target=str(file),
            hint="put each token into the block of the root, as TF_TOKEN_app_terraform_io, and remove it here",
        )
    return {file: file.resolve()}


def _errors(text: str) -> str:
    """The errors in what terraform printed, each once, bounded; all of the text when it has no `Error: ` blocks."""
    blocks = (block.strip() for block in re.split(r"^(?=Error: )", text, flags=re.MULTILINE))
    said = (
        "\n".join(
            dict.fromkeys(
                block for block in blocks if block.startswith("Error: ") and block != "Error: execution halted"
            )
        )
        or text
    )
    return process.tail("\n".join(line for line in said.splitlines() if line.strip()), 40)


def _spellings(values: Iterable[str]) -> list[str]:
    """Every form in which a secret may turn up: whole, parts of its JSON or URL, lines, escaped. The longest first."""
    found = set(values)
    for value in tuple(found):
        with suppress(ValueError, RecursionError):
            found |= {str(leaf) for _, leaf in tfplan.leaves(json.loads(value)) if isinstance(leaf, str | int | float)}
        with suppress(ValueError):
            found.add(unquote(urlsplit(value).password or ""))
    found |= {line.strip() for each in found for line in each.splitlines()}
    found |= {json.dumps(each, ensure_ascii=False)[1:-1] for each in found}
    return sorted(
        (each for each in found if len(each) >= SHORTEST and each.lower() not in ("true", "false", "null")),
        key=len,
        reverse=True,
    )
