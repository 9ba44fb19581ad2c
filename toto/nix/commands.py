"""The nix commands that toto needs: evaluate, build, add GC roots, inspect closures, copy, sign.

What is pushed is evaluated in a cell without a network, and built by toto's own daemon (`toto.nix.daemon`).

They are the old commands (nix-instantiate, nix-store) where possible: those have not changed for years, take and print
store paths, and behave the same since nix 2.8.
"""

import asyncio
import base64
import contextlib
import json
import logging
import os
import platform
import posixpath
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict, Unpack

from toto.base import process, server_rules
from toto.base.errors import TotoError
from toto.cell.cell import INFRA, STORE, Cell, shared
from toto.cell.limits import Limits
from toto.cell.namespace import Namespace, namespace
from toto.nix import builders, daemon, messages
from toto.nix.hosts import FLAKE, Host, check_name
from toto.nix.memory import Allowance
from toto.nix.messages import EXPRESSIONS, EvaluationFailed, OutOfMemory, is_of_the_network

log = logging.getLogger(__name__)

MEMORY: Final = 4_000_000_000  # bytes that an evaluation may use
# Where an evaluation's cell has toto's own expressions, and the daemon's socket and nix.conf.
_EXPRESSIONS: Final = messages.IN_CELL
_DAEMON: Final = Path("/daemon")
_LARGEST_DUMP: Final = 256_000_000  # bytes of what nix knows of a closure
_GARBAGE: Final = 4 * 3_600.0  # seconds to collect it
_FOR_DATABASE: Final = 2_000_000  # bytes, that are plenty for it to be opened
NEW: Final = ("--extra-experimental-features", "nix-command")
_FLAKES: Final = ("--extra-experimental-features", "nix-command flakes")
_DRV: Final = re.compile(r"/nix/store/[a-z0-9]{32}-[A-Za-z0-9+._?=-]+\.drv")
_OUTPUT: Final = re.compile(r'Derive\(\[\("out","(/nix/store/[^"/]+)","[^"]*","[^"]*"\)\],')
_OUTPUT_WITHIN: Final = 1000  # characters of a derivation's file, which has its outputs first
_SIZES: Final = re.compile(r"-vm-sizes-([0-9]{1,18})-([0-9]{1,18})\.drv$")  # as evaluate.nix names it
_BUILDS: Final = re.compile(r"building '/nix/store/[^']+\.drv'")  # what nix says of each build that it begins
_PAUSES: Final = (2, 10)  # seconds before a download is tried again


class BuildFailed(TotoError):
    """A derivation did not build. It is `transient` if a retry may succeed (the network, a substituter)."""

    def __init__(self, message: str, *, target: str | None, transient: bool, hint: str | None = None) -> None:
        super().__init__(message, target=target, hint=hint)
        self.transient = transient


class CopyFailed(TotoError):
    """A closure could not be signed, or not be copied to the machine."""


def environment() -> dict[str, str]:
    """The environment for nix: a client of toto's own daemon, whatever the caller's settings of nix are.

    (Root's clients are trusted: a `sandbox = false` of the caller's would reach the daemon.) nix's messages are plain
    text. Raises `DaemonFailed`.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TOTO_", "AWS_", "NIX_"))
    }
    kept |= {name: os.environ[name] for name in ("NIX_PATH", "NIX_SSL_CERT_FILE") if name in os.environ}
    return kept | daemon.client(daemon.socket()) | {"NO_COLOR": "1", "TERM": "dumb"}


async def _evaluate(host: Host, tree: Path, words: Sequence[str], limits: Limits, timeout: float) -> process.Completed:
    """Run a nix command as `_evaluate_once` does; once more, and again, when a download of a build failed."""
    for pause in _PAUSES:
        try:
            return await _evaluate_once(host, tree, words, limits, timeout)
        except EvaluationFailed as error:
            if not error.transient:
                raise
            log.warning("%s: a download failed; toto tries again in %d s", host.name, pause)
        await asyncio.sleep(pause)
    try:
        return await _evaluate_once(host, tree, words, limits, timeout)
    except EvaluationFailed as error:
        if not error.transient:
            raise
        what = "what its evaluation builds could not be downloaded"
        raise messages.of_the_network(error, what, len(_PAUSES) + 1) from None


async def _evaluate_once(
    host: Host, tree: Path, words: Sequence[str], limits: Limits, timeout: float, network: Namespace | None = None
) -> process.Completed:
    """Run a nix command that evaluates what was pushed, in a cell, with as many builds as the server allows.

    Raises `EvaluationFailed`, `CommandTimeout`.
    """
    socket, places = daemon.socket(), _search_path()
    cell = Cell(
        read={
            INFRA: tree,
            _EXPRESSIONS: EXPRESSIONS,
            _DAEMON: socket.parent,
            **{place: place for _, place in places if not place.is_relative_to(STORE)},
        },
        store=True,
        limits=limits,
        network=network,
    )
    env = daemon.client(_DAEMON / socket.name) | {
        "NIX_PATH": ":".join(f"{name}={place}" if name else str(place) for name, place in places),
        "NO_COLOR": "1",
        "GIT_ALLOW_PROTOCOL": "https:http",  # no git repository that is pushed as files, with settings of its own
        # A garbage collection during an evaluation takes time, and can crash with Debian's libgc (NixOS/nix issue
        # 4919). With a heap that is large from the start, a host of ordinary size needs none.
        "GC_INITIAL_HEAP_SIZE": os.environ.get("GC_INITIAL_HEAP_SIZE", "2G"),
    }
    command = [program(words[0]), *words[1:]]
    most, builds = server_rules.load().evaluation.builds, 0

    async def evaluate(more: dict[str, str]) -> process.Completed:
        async with asyncio.timeout(None) as allowed:

            def count(line: str) -> None:
                nonlocal builds
                builds += bool(_BUILDS.match(line))
                if builds > most:
                    allowed.reschedule(0)  # at once

            return await process.run(
                command, cell=cell, env=env | more, check=False, timeout=timeout, target=host.name, on_error_line=count
            )

    try:
        done = await evaluate({})
        if done.status == -signal.SIGSEGV:
            done = await evaluate({"GC_DONT_GC": "1"})
    except TimeoutError:
        done = None
    except process.LimitExceeded as error:
        failed = OutOfMemory if "of memory" in error.exceeded else EvaluationFailed
        raise failed(
            f"its evaluation was ended: it used more than {error.exceeded}", target=host.name, hint=messages.MEMORY
        ) from None
    if done is None or builds > most:  # (it may have ended by itself just then)
        raise EvaluationFailed(
            f"its evaluation was ended: it began more than the {most} builds that this server allows in an evaluation "
            "(import from derivation)",
            target=host.name,
            hint=f"have fewer files of the configuration built, or raise evaluation.builds in toto's "
            f"{server_rules.FILE}",
        )
    if done.status != 0:
        raise messages.failed(done, host, tree, await _copy_of(tree) if "-source/" in done.stderr else "")
    return done


def program(name: str) -> str:
    """A program of nix by the path that it has in a cell. Raises `CommandNotFound`."""
    found = shutil.which(name)
    if found is None:
        raise process.CommandNotFound(name)
    return str(Path(found).parent.resolve() / name)  # (a profile's folder is a link into the store)


def _search_path() -> list[tuple[str, Path]]:
    """NIX_PATH of toto's server: names ("" for none) and folders, by their real places."""
    entries = [each.rpartition("=") for each in os.environ.get("NIX_PATH", "").split(":") if each]
    return [(name, Path(folder).resolve()) for name, _, folder in entries if Path(folder).is_dir()]


def _confined(*, pure: bool, nixpkgs: str = "") -> list[str]:
    """The options that keep an evaluation to the tree, nixpkgs (at a store path, or else NIX_PATH's) and toto's own."""
    # What is pinned by its hash and in the store already is used; a cell has no network to fetch anything with.
    pinned = "http:// https:// git+https:// github: gitlab:"
    options = {
        "pure-eval" if pure else "restrict-eval": "true",
        "allowed-uris": f"{pinned} path:/nix/store/" if pure else pinned,
        # With flakes there is fetchTree, which copies any folder that the process may read, whatever is restricted.
        "experimental-features": "nix-command flakes" if pure else "nix-command",
        "allow-import-from-derivation": "true" if server_rules.load().evaluation.builds else "false",
    }
    readable = [] if pure else [INFRA, _EXPRESSIONS, *shared()]
    return [
        *(word for name, value in options.items() for word in ("--option", name, value)),
        *(("-I", f"nixpkgs={nixpkgs}") if nixpkgs else ()),
        *(word for number, place in enumerate(readable) for word in ("-I", f"toto-{number}={place}")),
    ]


def _locked(tree: Path, digest: str) -> str:
    """The reference of the tree's flake in a cell, with the hash by which pure evaluation takes it."""
    newest = max(int(each.lstat().st_mtime) for each in (tree, *tree.rglob("*")))
    return f"path:{INFRA}?lastModified={newest}&narHash={_sri(digest)}"


def _sri(digest: str) -> str:
    return f"sha256-{base64.b64encode(bytes.fromhex(digest)).decode()}"


async def _flake(tree: Path, folder: str = "") -> str:
    """The reference of the flake in a folder of the tree. Its source is the whole tree, as inputs like `../x` need."""
    done = await process.run(["nix-hash", "--type", "sha256", tree], env=environment(), timeout=120)
    digest = done.stdout.strip()
    if not folder:
        return await asyncio.to_thread(_locked, tree, digest)
    if await _paths_have_folders():
        return f"{await asyncio.to_thread(_locked, tree, digest)}&dir={folder}"
    # An old nix takes a folder for what is fetched alone; what is in the store already it does not fetch.
    copy = '{ tree }: "${builtins.path { path = /. + tree; name = "source"; }}"'
    words = ["nix-instantiate", "--eval", "--read-write-mode", "--expr", copy, "--argstr", "tree", str(tree)]
    await process.run(words, env=environment(), timeout=300)
    return f"https://tree.invalid/source.tar.gz?dir={folder}&narHash={_sri(digest)}"


async def _paths_have_folders() -> bool:
    """Whether toto's nix takes `path:TREE?dir=FOLDER`."""
    words = ["nix", *_FLAKES, "flake", "metadata", "path:/var/empty/none?dir=x"]
    done = await process.run(words, env=environment(), check=False, timeout=60)
    return "unsupported parameter" not in done.stderr


async def _fetch_inputs(tree: Path, flake: str, host: Host, limits: Limits, timeout: float) -> None:
    """Have the inputs that flake.lock names in the store. Raises `EvaluationFailed`, `CommandTimeout`.

    They are looked for without a network first, then fetched in a cell with the internet: flake.nix names them, so
    that nothing of this machine or of its neighbours may be within reach.
    """
    words = ["nix", *_FLAKES, "flake", "archive", "--no-update-lock-file", "--no-write-lock-file", flake]
    with contextlib.suppress(EvaluationFailed):
        await _evaluate_once(host, tree, words, limits, timeout)
        return
    async with namespace() as network:
        await network.attach()
        for pause in (*_PAUSES, None):
            try:
                await _evaluate_once(host, tree, words, limits, timeout, network)
                return
            except EvaluationFailed as error:
                if not is_of_the_network(str(error)):
                    raise
                if pause is None:
                    what = "its inputs could not be fetched"
                    raise messages.of_the_network(error, what, len(_PAUSES) + 1) from None
                await asyncio.sleep(pause)


async def flake_hosts(tree: Path, folder: str = ".", *, timeout: float, memory: int = MEMORY) -> list[Host] | None:
    """The nixosConfigurations of the flake in a folder of the tree, by name; None when it has no such output.

    Its locked inputs are fetched for it and for the evaluation of its hosts. `memory` is as in `instantiate`.
    Raises `EvaluationFailed`, `InputError` for a bad name, `CommandTimeout` after `timeout` seconds.
    """
    file = f"{folder}/{FLAKE}".removeprefix("./")
    itself = Host(file, file)
    limits = Limits(memory=memory)
    flake = await _flake(tree, posixpath.dirname(file))
    await _fetch_inputs(tree, flake, itself, limits, timeout)
    expression = (
        "{ flake }: let it = builtins.getFlake flake; in "
        "if it ? nixosConfigurations then builtins.attrNames it.nixosConfigurations else null"
    )
    done = await _evaluate(
        itself,
        tree,
        [
            *("nix-instantiate", "--show-trace", *_confined(pure=True)),
            *("--eval", "--strict", "--json", "--expr", expression, "--argstr", "flake", flake),
        ],
        limits,
        timeout,
    )
    if "not writing modified lock file" in done.stderr:  # older nix refuses this, newer nix only warns
        raise EvaluationFailed(
            f"its flake.lock is not what flake.nix asks for:\n{process.tail(done.stderr)}",
            target=file,
            hint=messages.LOCK,
        )
    names = json.loads(done.stdout)
    return None if names is None else [Host(check_name(name, file), flake=file) for name in sorted(names)]


class _How(TypedDict, total=False):
    nixpkgs: str
    system: str | None
    sandbox_key: str
    ports: Sequence[int]
    timeout: float
    memory: Allowance | None


@dataclass(frozen=True)
class Vm:
    """A host's VM for its rehearsal: its drv, and the MB of memory and of disks that it asks for; 0 when unknown."""

    drv: str
    memory: int = 0
    disk: int = 0


async def instantiate(tree: Path, host: Host, root: Path, **how: Unpack[_How]) -> str:
    """The drv path of a host's toplevel; a GC root at `root` keeps it.

    It is evaluated in a cell: without a network, and with at most the `memory` that it is allowed; what it used is
    noted there.
    Raises `EvaluationFailed` with nix's error and position, `CommandTimeout` after `timeout` seconds.
    """
    [drv] = await _instantiate(tree, host, ["toplevel"], **how)
    await _keep_drv(drv, root)
    return drv


async def instantiate_vm(tree: Path, host: Host, root: Path, **how: Unpack[_How]) -> Vm:
    """A host's VM, with toto's module; a GC root at `root` keeps its drv. It is evaluated as in `instantiate`."""
    try:
        drv, sizes = await _instantiate(tree, host, ["vm", "sizes"], **how)
    except OutOfMemory:
        raise
    except EvaluationFailed as error:  # (its toplevel has been evaluated before)
        raise messages.of_the_vm(error, host) from None
    await _keep_drv(drv, root)
    found = _SIZES.search(sizes)
    return Vm(drv, *map(int, found.groups())) if found else Vm(drv)


async def _instantiate(
    tree: Path,
    host: Host,
    attributes: Sequence[str],
    *,
    nixpkgs: str = "<nixpkgs>",
    system: str | None = None,
    sandbox_key: str = "",
    ports: Sequence[int] = (),
    timeout: float = 600,
    memory: Allowance | None = None,
) -> list[str]:
    """The drv path of each of `attributes` of evaluate.nix."""
    pure = not host.file
    arguments = {
        "tree": await _flake(tree, host.folder) if pure else str(INFRA),
        "name": host.name,
        "file": host.file,
        "sandboxKey": sandbox_key,
        "ports": json.dumps(list(ports)),
        "builder": f"{platform.machine()}-linux",
    }
    expression = [str(_EXPRESSIONS / "evaluate.nix")]
    if pure:  # it reads no file but those of the flake and its inputs
        texts = {name: (EXPRESSIONS / f"{name}.nix").read_text() for name in ("evaluate", "rehearsal")}
        expression = ["--expr", texts["evaluate"], "--arg", "rehearsal", texts["rehearsal"]]
    if nixpkgs != "<nixpkgs>" and not host.nixpkgs:
        arguments["nixpkgs"] = nixpkgs
    if system is not None:
        arguments["system"] = system
    done = await _evaluate(
        host,
        tree,
        [
            *("nix-instantiate", "--show-trace", *_confined(pure=pure, nixpkgs=host.nixpkgs), *expression),
            *(word for attribute in attributes for word in ("--attr", attribute)),
            *(word for name, value in arguments.items() for word in ("--argstr", name, value)),
        ],
        Limits(memory=memory.most if memory else MEMORY),
        timeout,
    )
    if memory:
        memory.used = max(memory.used, done.memory)
    if attributes[0] != "vm":  # (the VM's evaluation gives the same warnings once more)
        messages.hear(host.name, done.stderr)
    drvs = done.stdout.split()
    if len(drvs) != len(attributes) or not all(map(_DRV.fullmatch, drvs)):
        raise EvaluationFailed(
            f"`{attributes[0]}` is not one derivation but:\n{process.tail(done.stdout)}",
            target=host.name,
            hint=f"see {host.origin}",
        )
    return drvs


async def _keep_drv(drv: str, root: Path) -> None:
    """Make `root` an indirect GC root that keeps a derivation. (`nix-store --realise` would build it.)"""
    root.parent.mkdir(parents=True, exist_ok=True)
    await process.run(
        [
            *("nix-instantiate", "--add-root", root, "--indirect"),
            *("--expr", "{ drv }: import drv", "--argstr", "drv", drv),
        ],
        env=environment(),
        timeout=300,
    )


async def _copy_of(tree: Path) -> str:
    """The store path of a flake's copy, from which nix evaluates it: errors have its paths."""
    digest = await process.run(["nix-hash", "--type", "sha256", tree], env=environment(), timeout=120)
    return await fixed_path(digest.stdout.strip(), "source")


async def fixed_path(digest: str, name: str) -> str:
    """The store path of files whose hash (sha256, in hexadecimal) is known."""
    words = ["nix-store", "--print-fixed-path", "--recursive", "sha256", digest, name]
    return (await process.run(words, env=environment(), timeout=60)).stdout.strip()


def output(drv: str, *, target: str) -> str:
    """The path that a derivation builds, as its file in the store says.

    Raises `EvaluationFailed` when it has not one output whose path is known before it is built.
    """
    with Path(drv).open(encoding="utf-8", errors="replace") as file:
        found = _OUTPUT.match(file.read(_OUTPUT_WITHIN))
    if found is None:
        raise EvaluationFailed(
            f"{drv} has not one output `out` at a path that is known before it is built",
            target=target,
            hint="toto takes no system with more outputs, and no content-addressed one",
        )
    return found[1]


async def build(drv: str, root: Path, *, timeout: float, target: str, heard: builders.Heard | None = None) -> str:
    """Build a derivation, here or on a builder, and return its output path; a GC root at `root` keeps it.

    `heard` hears what nix says of it, and knows then who built what. What a builder was lost with is built again
    elsewhere, in the end here.
    Raises `BuildFailed`, `CommandTimeout` after `timeout` seconds.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    heard = heard or builders.Heard()
    words: list[process.Argument] = ["nix-store", "--realise", drv, "--add-root", root, "--indirect"]
    until = time.monotonic() + timeout
    failed = await _realised(words, heard, timeout, target)
    for more in ((), ("--builders", "")):
        if failed is not None and heard.lost:
            heard.lost = False
            failed = await _realised([*words, *more], heard, max(1.0, until - time.monotonic()), target)
    if failed is None:
        return str(root.readlink())
    if nobody := heard.nobody(failed.tail):
        raise BuildFailed(
            nobody,
            target=target,
            transient=bool(heard.failed),
            hint="look at the builders that are named here (docs/builders.md)"
            if heard.failed
            else f"add a builder for it to {server_rules.FILE} (docs/builders.md)",
        )
    raise BuildFailed(
        f"did not build{f' ({heard.who})' if heard.failed else ''}:\n{failed.tail}",
        target=target,
        transient=is_of_the_network(failed.tail),
        hint=f"read the whole log with `nix-store --read-log {drv}`",
    )


async def _realised(
    words: Sequence[process.Argument], heard: builders.Heard, timeout: float, target: str
) -> process.CommandFailed | None:
    """Run a nix command that builds; how it failed, if it did. Raises `CommandTimeout` after `timeout` seconds."""
    try:
        await process.run(words, env=environment(), timeout=timeout, on_error_line=heard, target=target)
    except process.CommandFailed as error:
        heard.ended(error.tail)
        return error
    return None


async def valid(path: str) -> bool:
    """Whether a path is in the local store, with its whole closure."""
    done = await process.run(["nix-store", "--check-validity", path], env=environment(), check=False, timeout=60)
    return done.status == 0


async def closure(path: str) -> list[str]:
    """The closure of a store path: the path itself and all paths that it refers to. Raises `CommandFailed`."""
    return (await process.run(["nix-store", "--query", "--requisites", path], env=environment(), timeout=120)).lines


async def nar_hash(path: str) -> str:
    """The hash of what is at a store path, as `sha256:…`. Raises `CommandFailed` when it is not in the store."""
    done = await process.run(["nix-store", "--query", "--hash", "--", path], env=environment(), timeout=60)
    return done.stdout.strip()


async def sizes(paths: Sequence[str]) -> dict[str, int]:
    """The bytes of each store path, without its references. Raises `CommandFailed`."""
    if not paths:
        return {}
    done = await process.run(["nix-store", "--query", "--size", *paths], env=environment(), timeout=120)
    return dict(zip(paths, map(int, done.lines), strict=True))


async def closure_size(path: str) -> int:
    """The bytes of a closure. Raises `CommandFailed`."""
    return sum((await sizes(await closure(path))).values())


async def add_gc_root(path: str, root: Path) -> None:
    """Make `root` an indirect GC root that keeps `path`, instead of what it kept before. Raises `CommandFailed`."""
    root.parent.mkdir(parents=True, exist_ok=True)
    await process.run(
        ["nix-store", "--realise", path, "--add-root", root, "--indirect"], env=environment(), timeout=300
    )


async def make_room(free: int) -> int:
    """Collect garbage until so many bytes of the store's disk are free, and no further; how many there are then.

    Garbage is what no GC root needs: toto has one for each last good and previous system, and for what runs work on.
    Raises `CommandFailed`, `CommandTimeout`, `TotoError` when there is too little room even for nix's database.
    """
    if (had := shutil.disk_usage(STORE).free) < free:
        words = ["nix-store", "--gc", "--max-freed", str(free - had)]
        try:
            await process.run(words, env=environment(), timeout=_GARBAGE)
        except process.CommandFailed as error:
            if had > _FOR_DATABASE:
                raise
            raise TotoError(
                f"no garbage can be collected: {had} bytes are free, and nix's database needs some\n{error.tail}",
                target=str(STORE),
                hint=f"remove a file of {_FOR_DATABASE // 10**6} MB or more from that disk, such as an old log; "
                "then start prune/prune again",
            ) from None
    return shutil.disk_usage(STORE).free


async def new_key(name: str) -> str:
    """A new secret key for `sign`, in nix's form `NAME:BASE64`. Raises `CommandFailed`."""
    return (await process.run(["nix", *NEW, "key", "generate-secret", "--key-name", name], timeout=60)).stdout


async def public_key(secret: str) -> str:
    """The public half of a secret key, as `nix.settings.trusted-public-keys` has it. Raises `CommandFailed`."""
    done = await process.run(["nix", *NEW, "key", "convert-secret-to-public"], stdin=secret.encode(), timeout=60)
    return done.stdout.strip()


async def sign(path: str, key: Path, folder: Path) -> None:
    """Sign a closure with a secret key file, for `copy`: `folder` becomes a nix database that has it with signatures.

    toto's nix daemon takes signatures of clients that it trusts with everything else as well, and would keep them for
    whoever copies the same paths. So they are in a database of their own, over the store as it is. Raises `CopyFailed`.
    """
    env = environment()
    own = _with_database(env, folder)
    try:
        paths = await closure(path)
        known = await process.run(["nix-store", "--dump-db", *paths], env=env, timeout=300, keep=_LARGEST_DUMP)
        await process.run(["nix-store", "--load-db"], env=own, stdin=known.stdout.encode(), timeout=300)
        await process.run(["nix", *NEW, "store", "sign", "--recursive", "--key-file", key, path], env=own, timeout=300)
    except process.CommandFailed as error:
        raise CopyFailed(f"could not sign {path}: {error.message}", hint="see nix.signing_key in toto.toml") from None


def _with_database(env: dict[str, str], folder: Path) -> dict[str, str]:
    return env | {"NIX_REMOTE": "local", "NIX_STATE_DIR": str(folder), "NIX_LOG_DIR": str(folder)}


async def copy(
    path: str,
    alias: str,
    ssh_config: Path,
    *,
    timeout: float,
    target: str,
    signed: Path | None = None,
    substitute: bool = False,
    on_line: process.LineSink | None = None,
) -> None:
    """Copy a closure to the machine that `ssh_config` calls `alias`; paths that it has are not sent.

    `signed` is the folder that `sign` has filled, when the closure is to have signatures there. With `substitute` the
    machine fetches what its own substituters have, and only the rest is sent; `compare` is called for afterwards.
    Raises `CopyFailed`, `CommandTimeout` after `timeout` seconds.
    """
    try:
        await process.run(
            [
                "nix",
                *NEW,
                "copy",
                *(["--substitute-on-destination"] if substitute else []),
                "--to",
                f"ssh://{alias}",
                path,
            ],
            env=(environment() if signed is None else _with_database(environment(), signed))
            | {"NIX_SSHOPTS": f"-F {ssh_config.name}"},  # nix splits it at blanks, which the folder may have
            cwd=ssh_config.parent,
            timeout=timeout,
            on_error_line=on_line,
            target=target,
        )
    except process.CommandFailed as error:
        raise CopyFailed(
            f"the closure could not be copied to the machine:\n{error.tail}",
            target=target,
            hint="is there room on its disk, and is toto among its nix.settings.trusted-users "
            "(or its key among trusted-public-keys)?",
        ) from None


async def compare(path: str, alias: str, ssh_config: Path, *, timeout: float, target: str) -> None:
    """Compare a closure on the machine that `ssh_config` calls `alias` with that in the local store, by their hashes.

    The name of a store path says what it was built from, and not what came out: what was built elsewhere, and is
    rightly signed, may differ. Raises `CopyFailed`, `CommandTimeout` after `timeout` seconds.
    """
    words = ["nix", *NEW, "path-info", "--recursive", "--json"]
    there = {"NIX_SSHOPTS": f"-F {ssh_config.name}"}
    hashes = []
    for store, env in (([], {}), (["--store", f"ssh://{alias}"], there)):
        try:
            done = await process.run(
                [*words, *store, path],
                env=environment() | env,
                cwd=ssh_config.parent,
                timeout=timeout,
                keep=_LARGEST_DUMP,
                target=target,
            )
        except process.CommandFailed as error:
            raise CopyFailed(
                f"the closure could not be compared with the machine's:\n{error.tail}", target=target
            ) from None
        said = json.loads(done.stdout)
        found = said.items() if isinstance(said, dict) else ((each["path"], each) for each in said)
        hashes.append({name: info["narHash"] for name, info in found})
    ours, theirs = hashes
    if different := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise CopyFailed(
            f"{len(different)} paths on the machine are not what was rehearsed, such as {different[0]}",
            target=target,
            hint="its substituters have a different build of it: leave `substitute` out in machines.yaml, delete the "
            "path on the machine (nix-store --delete), and push again",
        )
