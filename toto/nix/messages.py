"""What nix says of an evaluation, as the operator reads it: the error, where it is, and what to do next.

Old versions of nix print the error first and then the trace, newer ones the trace first, outermost step first.
"""

import logging
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Final

from toto.base import process
from toto.base.errors import InputError
from toto.cell.cell import INFRA
from toto.nix.hosts import Host

log = logging.getLogger(__name__)

EXPRESSIONS: Final = Path(__file__).parents[2] / "nix"
IN_CELL: Final = Path("/toto")  # where an evaluation's cell has them
MEMORY: Final = (
    "if there was too little memory: raise nix.evaluate_memory in toto.toml, so that fewer evaluations run side by side"
)
LOCK: Final = "run `nix flake lock` and commit flake.lock"
_OWN: Final = "toto's nix/"
_LINES: Final = 36  # shown of an error
_STEPS: Final = 6  # shown of a trace
_WARNINGS: Final = 20  # shown of a host
_WARNING_LINES: Final = 8  # shown of one

_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
# nixpkgs' lib.warn traces a warning; from nix 2.23 on it is a builtin. (nix's own warnings begin with `warning:`.)
_WARNING: Final = re.compile(r"(?:trace: (?:evaluation )?|evaluation )(warning: .*)")
# What nix itself says, which ends a warning of several lines.
_NIX: Final = re.compile(
    r"(evaluation )?warning: |trace: |error:|(evaluating|building|copying|querying|fetching|downloading|unpacking) |"
    r"(this|these) (\d+ )?(derivation|path)|\s*$"
)
# One that only says that there was an error, after it.
_ECHO: Final = re.compile(r"error: (\d+ dependenc|build of |\d+ derivation)")
_NOISE: Final = re.compile(
    r"\(use '--show-trace'.*|\(stack trace truncated.*|(warning: )?error: unable to download .*; retrying in .*"
)
_POSITION: Final = re.compile(r"\bat ([^\s:]+):(\d+)(?::(\d+))?")
_TEXT: Final = re.compile(r"«string»:(\d+)(?=\b)")
_DEFINED_IN: Final = re.compile(r"(?:[Ii]n|definitions from) `([^'`]*)'")
_NAMES_OPTION: Final = re.compile(r"\s*… while evaluating (the option|definitions from|the module argument)")
_OPTION: Final = re.compile(r"[Oo]ption `([^'`]+)'")
_COPY: Final = re.compile(r"/nix/store/[a-z0-9]{32}-source")
_LOCK_VERSION: Final = re.compile(r"lock file '[^']*' has unsupported version (\d+)")
_NOT_LOCKED: Final = re.compile(r"requires? lock file changes|cannot update (flake|unlocked) input")
# The flake's own reference, with the hash of its files: of one at the root, and of one in a folder (for an old nix).
_SELF: Final = re.compile(r"path:\.\?[^'\s]*|https://tree\.invalid/[^'\s]*")
_NOT_ON_PATH: Final = re.compile(r"file '([^'/]*)[^']*' was not found in the Nix search path")
_FETCH: Final = re.compile(r"error: unable to download '([^']*)'")
_NETWORK: Final = re.compile(
    r"unable to download|Could(n't| not) resolve host|Couldn't connect|Connection (reset|refused|timed out)|"
    r"HTTP error (429|5\d\d)|Timeout was reached|unexpected end-of-file|cannot connect to|TLS|"
    r"^.{0,9}(Connection to \S+ closed by remote host|Timeout, server \S+ not responding)",  # of a builder
    re.IGNORECASE | re.MULTILINE,
)
# What only a binary cache or a builder fetches while a host is evaluated: the evaluation itself has no network.
_OF_A_BUILD: Final = re.compile(r"unable to download '[^']*(\.narinfo|/nar/[^']*|nix-cache-info)'|builder for '")


class EvaluationFailed(InputError):
    """nix cannot evaluate the operator's configuration; the message is nix's own, with paths relative to the repo.

    It is `transient` when the network is to blame, so that a retry may succeed.
    """

    transient: bool = False


class OutOfMemory(EvaluationFailed):
    """An evaluation was ended because it used more memory than it may."""


def is_of_the_network(said: str) -> bool:
    """Whether a failed build or download may succeed when it is tried again."""
    return bool(_NETWORK.search(said))


_heard: Final[ContextVar[dict[str, list[str]] | None]] = ContextVar("heard", default=None)


@contextmanager
def hearing() -> Iterator[dict[str, list[str]]]:
    """Within the block, collect what evaluations warn of: each warning once, with the hosts that it was about."""
    heard: dict[str, list[str]] = {}
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


def hear(host: str, said: str) -> None:
    """Pass on the warnings in what nix printed for a host: to the block that listens, else to the log."""
    heard = _heard.get()
    for warning in warnings(said)[:_WARNINGS]:
        if heard is None:
            log.warning("%s: %s", host, warning)
        elif host not in (about := heard.setdefault(warning, [])):
            about.append(host)


def warnings(said: str) -> list[str]:
    """The warnings of a configuration in what nix printed, each once: `evaluation warning: …`, or a trace of one."""
    found: list[list[str]] = []
    open_ = False
    for line in _COLOUR.sub("", said).splitlines():
        if begins := _WARNING.match(line):
            found.append([begins[1].strip()])
            open_ = True
        elif open_ := open_ and not _NIX.match(line):
            found[-1].append(line.strip())
    return list(
        dict.fromkeys("\n  ".join(process.shorten(line, 300) for line in each[:_WARNING_LINES]) for each in found)
    )


def failed(done: process.Completed, host: Host, tree: Path, copy: str = "") -> EvaluationFailed:
    """The error in what nix printed, with paths relative to the tree. `copy` is the tree's store path, or empty."""
    said = _COLOUR.sub("", done.stderr).strip()
    if done.status < 0 or "out of memory" in said.lower():
        ended = f"was ended by {signal.Signals(-done.status).name}" if done.status < 0 else "ran out of memory"
        return EvaluationFailed(f"its evaluation {ended}:\n{process.tail(said)}", target=host.name, hint=MEMORY)
    text = _relative(said, copy)
    error, trace = _error_and_trace(text)

    def is_ours(path: str) -> bool:
        return _is_of(tree, path)

    where = _place(error, is_ours) or next(filter(None, (_place(step, is_ours) for step in trace)), None)
    lines = error.splitlines()
    if _place(error, is_ours) is None:
        lines += _telling(trace, is_ours)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES // 2], "…", *lines[1 - _LINES // 2 :]]
    what, hint = _what_and_hint(error, where or host.origin)
    made = EvaluationFailed(
        f"{what}:\n" + _without_hashes(process.tail("\n".join(lines), _LINES)), target=host.name, hint=hint
    )
    made.transient = bool(_OF_A_BUILD.search(error)) and is_of_the_network(error)
    return made


def of_the_vm(error: EvaluationFailed, host: Host) -> EvaluationFailed:
    """The error of a host's VM, when the host's own system evaluates."""
    if not error.message.startswith("does not evaluate"):
        return error
    option = _OPTION.search(error.message)
    which = f"`{option[1]}`" if option else "what only the real machine has"
    made = EvaluationFailed(
        error.message.replace("does not evaluate", "its VM does not evaluate", 1),
        target=host.name,
        hint=f"replace {which} in `virtualisation.vmVariant` of {host.origin}: the machine's own system evaluates",
    )
    made.transient = error.transient
    return made


def of_the_network(error: EvaluationFailed, what: str, tries: int) -> EvaluationFailed:
    """The error of downloads that failed each time, in words that blame the network and no file."""
    return EvaluationFailed(
        f"{what}, after {tries} tries:\n{error.message.partition(chr(10))[2]}",
        target=error.target,
        hint="that is the network's or the other server's; start the run again when it answers",
    )


def _relative(said: str, copy: str) -> str:
    """nix's words with the paths of the operator's files relative to the repo, and toto's own by their names.

    (An input's files are not the operator's, although they may have the same names.)
    """
    text = said.replace(f"{copy}/", "") if copy else said
    text = text.replace(f"{INFRA}/", "").replace(str(INFRA), ".").replace(f"{IN_CELL}/", _OWN)
    text = _SELF.sub("path:.", text)
    texts = {path.name: path.read_text().splitlines() for path in sorted(EXPRESSIONS.glob("*.nix"))}

    def name(match: re.Match[str]) -> str:
        """A flake's host is evaluated by texts of toto's, not by files: nix quotes the line that it means."""
        number = int(match[1]) if len(match[1]) < 6 else 0
        quoted = re.search(rf"^ *{number}\| ?(.*)$", text[match.end() : match.end() + 400], re.MULTILINE)
        for file, lines in texts.items():
            if quoted and 0 < number <= len(lines) and lines[number - 1].strip() == quoted[1].strip():
                return f"{_OWN}{file}:{number}"
        return match[0]

    return _TEXT.sub(name, text)


def _error_and_trace(text: str) -> tuple[str, list[str]]:
    """The last error in what nix printed, and the steps of its trace, the innermost first."""
    lines = [line for line in text.splitlines() if not _NOISE.fullmatch(line.strip())]
    begins = [number for number, line in enumerate(lines) if line.lstrip().startswith("error:")]
    own = [number for number in begins if not _ECHO.match(lines[number].lstrip())] or begins or [0]
    before, error = lines[: own[-1]], lines[own[-1] :]
    end = next((number for number, line in enumerate(error) if line.lstrip().startswith("…")), len(error))
    return "\n".join(error[:end]).strip(), [*_steps(error[end:]), *reversed(list(_steps(before)))]


def _steps(lines: Sequence[str]) -> Iterator[str]:
    """The steps of a trace: each begins with `…` and goes on up to the next one."""
    step: list[str] = []
    for line in lines:
        if line.lstrip().startswith("…"):
            if step:
                yield "\n".join(step)
            step = [line]
        elif step:
            step.append(line)
    if step:
        yield "\n".join(step)


def _telling(trace: Sequence[str], is_ours: Callable[[str], bool]) -> list[str]:
    """The lines of a trace that say which option is meant and which line of the operator's led there."""
    shown: list[str] = []
    for step in trace:
        first = step.splitlines()[0].strip()
        at = next((match for match in _POSITION.finditer(step) if is_ours(match[1])), None)
        if _NAMES_OPTION.match(step):
            shown.append(f"       {first}")
        elif at:
            shown.append(f"       {first} {at[0]}" if at[0] not in first else f"       {first}")
    return list(dict.fromkeys(shown))[:_STEPS]


def _place(text: str, is_ours: Callable[[str], bool]) -> str | None:
    """The first file of the operator's that a text names, with the line where it has one."""
    for match in _POSITION.finditer(text):
        if is_ours(match[1]):
            return f"{match[1]}:{match[2]}"
    for match in _DEFINED_IN.finditer(text):  # `hosts/a.nix, via option …`, `flake.nix#nixosModules.x`
        if is_ours(file := re.split(r",|#", match[1])[0].strip()):
            return file
    return None


def _what_and_hint(error: str, where: str) -> tuple[str, str]:
    """The first line of the message, and the next step."""
    what = f"does not evaluate ({where})"
    if version := _LOCK_VERSION.search(error):
        return (
            f"toto's nix is too old for version {version[1]} of flake.lock",
            "give toto a newer nix, or lock with the nix that it has",
        )
    if _NOT_LOCKED.search(error):
        return "its flake.lock is not what flake.nix asks for", LOCK
    if found := _NOT_ON_PATH.search(error):
        if found[1] == "nixpkgs":
            return what, "say where nixpkgs is: nix.nixpkgs in toto.toml, or NIX_PATH of toto's server"
        return what, (
            f"toto's NIX_PATH has no <{found[1]}>: pin it in the repo (npins, niv, or an input of a flake), or add it "
            "to NIX_PATH of toto's server"
        )
    if (fetched := _FETCH.match(error)) and not _OF_A_BUILD.search(error):
        return what, (
            f"an evaluation has no network: have {fetched[1]} as an input of a flake, or fetch it in a build "
            "(pkgs.fetchurl), with its hash"
        )
    return what, f"fix {where} and push again"


def _is_of(tree: Path, path: str) -> bool:
    """Whether a path in an error is that of a file of the tree."""
    try:
        return not path.startswith("/") and ".." not in Path(path).parts and (tree / path).is_file()
    except (OSError, ValueError):  # it is no path at all
        return False


def _without_hashes(text: str) -> str:
    """nix's message without the hash of a file or folder of the cell, and without the store path of its copy.

    Who knows one of them may read it, by fetchTree or in a build, and the whole store is such a folder.
    """
    lines, local = text.splitlines(), 0
    for number, line in enumerate(lines):
        if "hash mismatch" in line and ("path:" in line or "file:" in line):
            local = 4  # nix spreads the message over so many lines
        if local:
            lines[number] = _COPY.sub("…", re.sub(r"\bgot:?\s+\S+", "got …", line))
            local -= 1
    return "\n".join(lines)
