"""The nix commands that toto needs: evaluate, build, add GC roots, inspect closures, copy, sign.

They are the old commands (nix-instantiate, nix-store) where possible: those have not changed for years, take and print
store paths, and behave the same since nix 2.8.
"""

import json
import logging
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toto.base import process
from toto.base.errors import InputError, TotoError
from toto.nix.hosts import Host, check_name

log = logging.getLogger(__name__)

EXPRESSIONS: Final = Path(__file__).parents[2] / "nix"
_NEW: Final = ("--extra-experimental-features", "nix-command")
_POSITION: Final = re.compile(r"\bat ([^\s:]+):(\d+)(?::(\d+))?")
_DEFINED_IN: Final = re.compile(r"[Ii]n `([^/'][^']*)'")
_LOCK: Final = "run `nix flake lock` and commit flake.lock: without it two runs may use different nixpkgs"
# nix evaluates a flake from its copy in the store, and errors have the paths of that copy.
_IN_STORE: Final = re.compile(r"/nix/store/[a-z0-9]{32}-source/([^\s:'`\"]+)")
_TRANSIENT: Final = re.compile(
    r"unable to download|Could not resolve host|Couldn't connect|Connection (reset|refused|timed out)|"
    r"HTTP error (429|5\d\d)|Timeout was reached|unexpected end-of-file|cannot connect to|TLS",
    re.IGNORECASE,
)


class EvaluationFailed(InputError):
    """nix cannot evaluate the operator's configuration; the message is nix's own, with paths relative to the repo."""


class BuildFailed(TotoError):
    """A derivation did not build. It is `transient` if a retry may succeed (the network, a substituter)."""

    def __init__(self, message: str, *, target: str | None, transient: bool, hint: str | None = None) -> None:
        super().__init__(message, target=target, hint=hint)
        self.transient = transient


class CopyFailed(TotoError):
    """A closure could not be signed, or not be copied to the machine."""


def environment() -> dict[str, str]:
    """The environment for nix: its messages are plain text, and builtins.getEnv finds no secret in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TOTO_", "AWS_"))}
    # A build may run as one of nix's build users, who cannot enter toto's temporary folder: use the machine's.
    if (machines := os.environ.get("TOTO_TMPDIR")) is not None:
        kept = {name: value for name, value in kept.items() if name != "TMPDIR"} | (
            {"TMPDIR": machines} if machines else {}
        )
    # A garbage collection during an evaluation takes time, and can crash with Debian's libgc (NixOS/nix issue 4919).
    # With a heap that is large from the start, a host of ordinary size needs none.
    return {"GC_INITIAL_HEAP_SIZE": "2G"} | kept | {"TERM": "dumb", "NO_COLOR": "1"}


async def _instantiate(
    host: Host, tree: Path, arguments: Sequence[process.Argument], timeout: float
) -> process.Completed:
    """Run nix-instantiate. Raises `EvaluationFailed`, `CommandTimeout`."""
    command = ["nix-instantiate", *arguments]
    done = await process.run(command, env=environment(), check=False, timeout=timeout, target=host.name)
    if done.status == -signal.SIGSEGV:
        done = await process.run(
            command, env=environment() | {"GC_DONT_GC": "1"}, check=False, timeout=timeout, target=host.name
        )
    if done.status != 0:
        raise _evaluation_failed(done, host, tree)
    return done


async def flake_hosts(tree: Path, *, timeout: float) -> list[Host] | None:
    """The nixosConfigurations of the tree's flake, by name; None when there is no flake, or it has no such output.

    Raises `EvaluationFailed`, `InputError` for a bad name, `CommandTimeout` after `timeout` seconds.
    """
    if not (tree / "flake.nix").is_file():
        return None
    expression = (
        '{ tree }: let flake = builtins.getFlake "path:${tree}"; in '
        "if flake ? nixosConfigurations then builtins.attrNames flake.nixosConfigurations else null"
    )
    done = await _instantiate(
        Host("flake.nix", "flake.nix"),
        tree,
        ["--eval", "--strict", "--json", "--expr", expression, "--argstr", "tree", str(tree)],
        timeout,
    )
    if "not writing modified lock file" in done.stderr:  # older nix refuses this, newer nix only warns
        raise EvaluationFailed(
            f"its flake.lock does not lock all inputs:\n{process.tail(done.stderr)}", target="flake.nix", hint=_LOCK
        )
    names = json.loads(done.stdout)
    return None if names is None else [Host(check_name(name, "flake.nix")) for name in sorted(names)]


async def instantiate(
    tree: Path,
    host: Host,
    attribute: str,
    root: Path,
    *,
    nixpkgs: str = "<nixpkgs>",
    system: str | None = None,
    sandbox_key: str = "",
    ports: Sequence[int] = (),
    timeout: float = 600,
) -> str:
    """The drv path of `attribute` (`toplevel` or `vm`) of a host; a GC root at `root` keeps it.

    Raises `EvaluationFailed` with nix's error and position, `CommandTimeout` after `timeout` seconds.
    """
    arguments = {
        "tree": str(tree),
        "name": host.name,
        "file": host.file,
        "sandboxKey": sandbox_key,
        "ports": json.dumps(list(ports)),
    }
    if nixpkgs != "<nixpkgs>":
        arguments["nixpkgs"] = nixpkgs
    if system is not None:
        arguments["system"] = system
    root.parent.mkdir(parents=True, exist_ok=True)
    done = await _instantiate(
        host,
        tree,
        [
            EXPRESSIONS / "evaluate.nix",
            "--attr",
            attribute,
            "--add-root",
            root,
            "--indirect",
            *(word for name, value in arguments.items() for word in ("--argstr", name, value)),
        ],
        timeout,
    )
    for line in done.stderr.splitlines():
        if "warning:" in line and "trace" in line:
            log.warning("%s: %s", host.name, line)
    return str(root.readlink())


def _evaluation_failed(done: process.Completed, host: Host, tree: Path) -> EvaluationFailed:
    said = done.stderr.strip()
    if done.status < 0 or "out of memory" in said.lower():
        ended = f"was ended by {signal.Signals(-done.status).name}" if done.status < 0 else "ran out of memory"
        return EvaluationFailed(
            f"its evaluation {ended}:\n{process.tail(said)}",
            target=host.name,
            hint="if there was too little memory: raise nix.evaluate_memory in toto.toml, so that "
            "fewer evaluations run side by side",
        )
    text = _IN_STORE.sub(lambda match: match[1] if (tree / match[1]).exists() else match[0], said)
    text = text.replace(f"{tree}/", "").replace(str(tree), ".")
    at = next((match for match in _POSITION.finditer(text) if not match[1].startswith("/")), None)
    file = _DEFINED_IN.search(text)
    where = f"{at[1]}:{at[2]}" if at else file[1] if file else host.origin
    hint = f"fix {where} and push again"
    if "requires lock file changes" in text:
        hint = _LOCK
    elif "Nix search path" in text or "evaluate.nix:" in text:
        hint = "say where nixpkgs is: nix.nixpkgs in toto.toml, or NIX_PATH of toto's server"
    lines = text[max(0, text.find("error:")) :].splitlines()
    if len(lines) > 36:
        lines = [*lines[:15], "…", *lines[-20:]]
    return EvaluationFailed(
        f"does not evaluate ({where}):\n" + process.tail("\n".join(lines), 36), target=host.name, hint=hint
    )


async def outputs(drv: str) -> list[str]:
    """The output paths of a derivation, built or not. Raises `CommandFailed`."""
    return (await process.run(["nix-store", "--query", "--outputs", drv], env=environment(), timeout=60)).lines


async def build(drv: str, root: Path, *, timeout: float, target: str, on_line: process.LineSink | None = None) -> str:
    """Build a derivation and return its output path; a GC root at `root` keeps it.

    Raises `BuildFailed`, `CommandTimeout` after `timeout` seconds.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        await process.run(
            ["nix-store", "--realise", drv, "--add-root", root, "--indirect"],
            env=environment(),
            timeout=timeout,
            on_error_line=on_line,
            target=target,
        )
    except process.CommandFailed as error:
        raise BuildFailed(
            f"did not build:\n{error.tail}",
            target=target,
            transient=bool(_TRANSIENT.search(error.tail)),
            hint=f"read the whole log with `nix-store --read-log {drv}`",
        ) from None
    return str(root.readlink())


async def valid(path: str) -> bool:
    """Whether a path is in the local store, with its whole closure."""
    done = await process.run(["nix-store", "--check-validity", path], env=environment(), check=False, timeout=60)
    return done.status == 0


async def closure(path: str) -> list[str]:
    """The closure of a store path: the path itself and all paths that it refers to. Raises `CommandFailed`."""
    return (await process.run(["nix-store", "--query", "--requisites", path], env=environment(), timeout=120)).lines


async def sizes(paths: Sequence[str]) -> dict[str, int]:
    """The bytes of each store path, without its references. Raises `CommandFailed`."""
    if not paths:
        return {}
    done = await process.run(["nix-store", "--query", "--size", *paths], env=environment(), timeout=120)
    return dict(zip(paths, map(int, done.lines), strict=True))


async def add_gc_root(path: str, root: Path) -> None:
    """Make `root` an indirect GC root that keeps `path`, instead of what it kept before. Raises `CommandFailed`."""
    root.parent.mkdir(parents=True, exist_ok=True)
    await process.run(
        ["nix-store", "--realise", path, "--add-root", root, "--indirect"], env=environment(), timeout=300
    )


async def sign(path: str, key: Path) -> None:
    """Sign a closure with a secret key file, so that machines accept it from any user. Raises `CopyFailed`."""
    try:
        await process.run(
            ["nix", *_NEW, "store", "sign", "--recursive", "--key-file", key, path], env=environment(), timeout=300
        )
    except process.CommandFailed as error:
        raise CopyFailed(f"could not sign {path}: {error.message}", hint="see nix.signing_key in toto.toml") from None


async def copy(
    path: str, alias: str, ssh_config: Path, *, timeout: float, target: str, on_line: process.LineSink | None = None
) -> None:
    """Copy a closure to the machine that `ssh_config` calls `alias`; paths that it has are not sent.

    Raises `CopyFailed`, `CommandTimeout` after `timeout` seconds.
    """
    try:
        await process.run(
            ["nix", *_NEW, "copy", "--to", f"ssh://{alias}", path],
            env=environment() | {"NIX_SSHOPTS": f"-F {ssh_config}"},
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
