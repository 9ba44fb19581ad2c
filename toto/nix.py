"""The verbs of nix that toto needs: evaluate, build, root, look at closures, copy, sign.

The old commands (nix-instantiate, nix-store) where they serve: they are stable since years, take and
print store paths, and behave alike from nix 2.8 on.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from toto import process
from toto.errors import InputError, TotoError
from toto.hosts import Host, check_name

EXPRESSIONS: Final = Path(__file__).parent.parent / "nix"
_NEW: Final = ("--extra-experimental-features", "nix-command")
_POSITION: Final = re.compile(r"\bat ([^\s:]+):(\d+)(?::(\d+))?")
_TRANSIENT: Final = re.compile(
    r"unable to download|Could not resolve host|Couldn't connect|Connection (reset|refused|timed out)|"
    r"HTTP error (429|5\d\d)|Timeout was reached|unexpected end-of-file|cannot connect to|TLS", re.IGNORECASE)


class EvaluationFailed(InputError):
    """nix refused the operator's configuration; the message is nix's own, its position made relative."""


class BuildFailed(TotoError):
    """A derivation did not build. `transient` where another try may succeed (the network, a substituter)."""

    def __init__(self, message: str, *, target: str | None, transient: bool, hint: str | None = None) -> None:
        super().__init__(message, target=target, hint=hint)
        self.transient = transient


class CopyFailed(TotoError):
    """A closure did not reach the machine."""


def environment() -> dict[str, str]:
    """The environment for nix: messages in plain text, and nothing secret that builtins.getEnv could read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TOTO_", "AWS_"))}
    return kept | {"TERM": "dumb", "NO_COLOR": "1"}


async def flake_hosts(tree: Path, *, timeout: float) -> list[Host] | None:
    """The nixosConfigurations of the tree's flake, by name; None when it has no flake or no such output.

    Raises `EvaluationFailed`.
    """
    if not (tree / "flake.nix").is_file():
        return None
    expression = ('{ tree }: let flake = builtins.getFlake "path:${tree}"; in '
                  "if flake ? nixosConfigurations then builtins.attrNames flake.nixosConfigurations else null")
    try:
        done = await process.run(
            ["nix-instantiate", "--eval", "--strict", "--json", "--expr", expression, "--argstr", "tree", str(tree)],
            env=environment(), timeout=timeout, target="flake.nix")
    except process.CommandFailed as error:
        raise _evaluation_failed(error, Host("flake.nix", "flake.nix"), tree) from None
    names = json.loads(done.stdout)
    return None if names is None else [Host(check_name(name, "flake.nix")) for name in sorted(names)]


async def instantiate(tree: Path, host: Host, attribute: str, root: Path, *, nixpkgs: str = "<nixpkgs>",
                      system: str | None = None, sandbox_key: str = "", ports: Sequence[int] = (),
                      timeout: float = 600) -> str:
    """The drv path of a host's `toplevel` or `vm`, kept from garbage collection by a root at `root`.

    Raises `EvaluationFailed` with nix's error and position, `CommandTimeout` after `timeout` seconds.
    """
    arguments = {"tree": str(tree), "name": host.name, "file": host.file, "sandboxKey": sandbox_key,
                 "ports": json.dumps(list(ports))}
    if nixpkgs != "<nixpkgs>":
        arguments["nixpkgs"] = nixpkgs
    if system is not None:
        arguments["system"] = system
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        await process.run(
            ["nix-instantiate", EXPRESSIONS / "evaluate.nix", "--attr", attribute, "--add-root", root, "--indirect",
             *(word for name, value in arguments.items() for word in ("--argstr", name, value))],
            env=environment(), timeout=timeout, target=host.name)
    except process.CommandFailed as error:
        raise _evaluation_failed(error, host, tree) from None
    return str(root.readlink())


def _evaluation_failed(error: process.CommandFailed, host: Host, tree: Path) -> EvaluationFailed:
    if error.status < 0 or "out of memory" in error.tail.lower():
        return EvaluationFailed(f"its evaluation was ended: {error.message}", target=host.name,
                                hint="most often memory: lower the number of evaluations side by side "
                                     "(raise nix.evaluate_memory in toto.toml)")
    text = error.tail.replace(f"{tree}/", "").replace(str(tree), ".")
    at = next((match for match in _POSITION.finditer(text) if not match[1].startswith("/")), None)
    where = f"{at[1]}:{at[2]}" if at else host.origin
    hint = f"mend {where} and push again"
    if "requires lock file changes" in text:
        hint = "run `nix flake lock` and commit flake.lock: without it two runs may see two nixpkgs"
    return EvaluationFailed(f"does not evaluate ({where}):\n{text}", target=host.name, hint=hint)


async def outputs(drv: str) -> list[str]:
    """The output paths of a derivation, whether built or not."""
    return (await process.run(["nix-store", "--query", "--outputs", drv], env=environment(), timeout=60)).lines


async def build(drv: str, root: Path, *, timeout: float, target: str,
                on_line: process.LineSink | None = None) -> str:
    """Build a derivation, keep its output by a root at `root`, and return the output path.

    Raises `BuildFailed`, `CommandTimeout` after `timeout` seconds.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        await process.run(["nix-store", "--realise", drv, "--add-root", root, "--indirect"], env=environment(),
                          timeout=timeout, on_error_line=on_line, target=target)
    except process.CommandFailed as error:
        raise BuildFailed(f"did not build:\n{error.tail}", target=target,
                          transient=bool(_TRANSIENT.search(error.tail)),
                          hint=f"see the whole log with `nix-store --read-log {drv}`") from None
    return str(root.readlink())


async def valid(path: str) -> bool:
    """Whether a path is in the local store, whole."""
    done = await process.run(["nix-store", "--check-validity", path], env=environment(), check=False, timeout=60)
    return done.status == 0


async def closure(path: str) -> list[str]:
    """The closure of a store path: itself and all that it refers to."""
    return (await process.run(["nix-store", "--query", "--requisites", path], env=environment(), timeout=120)).lines


async def sizes(paths: Sequence[str]) -> dict[str, int]:
    """Bytes of each store path (of its own, not of its closure)."""
    if not paths:
        return {}
    done = await process.run(["nix-store", "--query", "--size", *paths], env=environment(), timeout=120)
    return dict(zip(paths, map(int, done.lines), strict=True))


async def keep(path: str, root: Path) -> None:
    """Keep a store path from garbage collection by an indirect root, replacing what the root kept before."""
    root.parent.mkdir(parents=True, exist_ok=True)
    await process.run(["nix-store", "--realise", path, "--add-root", root, "--indirect"], env=environment(),
                      timeout=300)


def let_go(directory: Path) -> None:
    """Remove a directory of roots; the next garbage collection may take what they kept."""
    shutil.rmtree(directory, ignore_errors=True)


async def sign(path: str, key: Path) -> None:
    """Sign a closure with a secret key file, so that machines may accept it from anyone."""
    try:
        await process.run(["nix", *_NEW, "store", "sign", "--recursive", "--key-file", key, path], env=environment(),
                          timeout=300)
    except process.CommandFailed as error:
        raise CopyFailed(f"could not sign {path}: {error.message}", hint="see nix.signing_key in toto.toml") from None


async def copy(path: str, alias: str, ssh_config: Path, *, timeout: float, target: str,
               on_line: process.LineSink | None = None) -> None:
    """Copy a closure to the machine that `ssh_config` calls `alias`; only what it lacks is sent.

    Raises `CopyFailed`, `CommandTimeout`.
    """
    try:
        await process.run(["nix", *_NEW, "copy", "--to", f"ssh://{alias}", path],
                          env=environment() | {"NIX_SSHOPTS": f"-F {ssh_config}"}, timeout=timeout,
                          on_error_line=on_line, target=target)
    except process.CommandFailed as error:
        raise CopyFailed(f"the closure did not reach the machine:\n{error.tail}", target=target,
                         hint="is there room on its disk, and is toto among its nix.settings.trusted-users "
                              "(or its key among trusted-public-keys)?") from None
