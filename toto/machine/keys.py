"""toto's keys: one ssh key of each infra repo for its machines, and toto's own for the sandboxes.

They are made when first needed, and their private halves are never shown. A repo may have more keys, by names that
`ssh.identity` in its manifest and `nix.signing_key` in its settings use: ssh keys, and nix's keys that sign closures.
No repo can name a key of a different one.
"""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from toto.base import files, made_once, paths, process
from toto.base.errors import InputError
from toto.git_host import shared
from toto.infra_repo.fields import check_key_name
from toto.ledger.ledger import Ledger
from toto.nix import commands as nix

MACHINES: Final = "machines"
INPUTS: Final = "inputs"  # reads the private inputs of flakes
STORE: Final = "store"  # signs closures, where no setting names another
Use: TypeAlias = Literal["ssh", "signing"]
USES: Final[tuple[Use, ...]] = get_args(Use)
_WORDS: Final[dict[Use, str]] = {"ssh": "a private ssh key", "signing": "a secret key of nix"}


async def private(name: str) -> Path:
    """The private key file of one of toto's own keys (`sandbox`); it is made when missing."""
    return await _made(paths.state_home() / "keys" / name, f"toto {name}")


async def public(name: str) -> str:
    """The public half of one of toto's own keys, as one line without its comment."""
    return await public_half(await private(name))


async def of_machines(repo: Path) -> Path:
    """The private key by which toto logs in to the machines of an infra repo; it is made when missing.

    Version 0.1.0 had one key for all machines. A repo that has deployed machines by it keeps it, and so does the only
    repo that there is: a fresh key would lock toto out of them.
    """
    key = _folder(repo) / MACHINES
    if not key.exists() and inherits(repo):
        old = old_key()
        for half in (old.with_suffix(".pub"), old):  # the private half last: it says that the key is there
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                (key.parent / half.name).hardlink_to(half)
    return await _made(key, f"toto {shared.name_of(repo)}")


def there(repo: Path, name: str) -> bool:
    """Whether an infra repo has a key of this name, or would inherit it."""
    return (paths.repo_state_of(repo) / "keys" / name).is_file() or (name == MACHINES and inherits(repo))


def old_key() -> Path:
    """The one key that version 0.1.0 had for all machines."""
    return paths.state_home() / "keys" / MACHINES


def inherits(repo: Path) -> bool:
    """Whether a repo's machines know the old key."""
    if not old_key().is_file():
        return False
    return shared.is_only_one(repo) or any(target.kind == "host" for target in Ledger(repo).read().entries)


def with_the_old_key(repos: Sequence[Path]) -> list[str]:
    """A line when several repos have version 0.1.0's key for the machines: by that each could deploy the others'."""
    names = [
        shared.name_of(repo) for repo in repos if inherits(repo) and _same(paths.repo_state(repo) / "keys" / MACHINES)
    ]
    if len(names) < 2:
        return []
    return [
        f"{' and '.join(names)} log in to their machines by the same key, of version 0.1.0\n"
        "next: make a new one for all but one of them (ssh-keygen -t ed25519 -N '' -f FILE), deploy its public half "
        f"to their machines, then: toto key {names[-1]} --import FILE"
    ]


def _same(key: Path) -> bool:
    """Whether a key is the old one, or will be, when it is first needed."""
    return not key.exists() or key.read_bytes() == old_key().read_bytes()


async def identity(repo: Path, name: str | None) -> Path:
    """The private key of an infra repo that the manifest's `ssh.identity` names; its key for the machines for None.

    Raises `InputError` when a named key is missing: toto does not make it.
    """
    if name is None or name == MACHINES:
        return await of_machines(repo)
    return named(repo, name, "ssh", "machines.yaml: ssh.identity")


def signing(repo: Path, name: str) -> Path:
    """The secret key of an infra repo that `nix.signing_key` names. Raises `InputError` when it is missing."""
    return named(repo, name, "signing", "toto.toml: nix.signing_key")


async def for_closures(repo: Path, name: str | None) -> Path:
    """The secret key that signs what a repo's machines get: the one of the settings, else its own, which is made.

    Raises `InputError` when the one of the settings is missing.
    """
    return await make(repo, STORE, "signing") if name is None else signing(repo, name)


def of_inputs(repo: Path) -> tuple[Path, Path]:
    """The ssh key by which an infra repo reads private inputs of its flake, and the file with the host keys it trusts.

    Raises `InputError` when the key is missing: toto does not make it.
    """
    key = _folder(repo) / INPUTS
    if not key.is_file():
        raise InputError(
            f"has inputs that are read by ssh, and this repository has no key `{INPUTS}` for that",
            target="flake.lock",
            hint=f"on toto: toto key {shared.name_of(repo)} {INPUTS} --new ssh; let that key read there, and only read",
        )
    return named(repo, INPUTS, "ssh", "flake.lock: an input"), paths.repo_state(repo) / "inputs_known_hosts"


def named(repo: Path, name: str, use: Use | None, where: str) -> Path:
    """The private key of an infra repo by its name, for one use, or for any. `where` is what names it: `FILE: SETTING`.

    Raises `InputError` when there is none, or when it is for a different use.
    """
    key, (file, _, setting) = _folder(repo) / check_key_name(name), where.partition(": ")
    here = f"on toto: toto key {shared.name_of(repo)}"
    try:
        found = _use(key.read_text())
    except (OSError, ValueError):
        raise InputError(
            f"this repository has no key {name}, which {setting} names",
            target=file,
            hint=f"{here} {name} --import FILE, or --new {use or 'ssh'}",
        ) from None
    if found is None or use not in (None, found):
        raise InputError(
            f"{setting} names the key {name}, which is not {_WORDS[use or 'ssh']}",
            target=file,
            hint=f"{here} OTHER-NAME --new {use or 'ssh'}, and name that one",
        )
    return key


async def make(repo: Path, name: str, use: Use) -> Path:
    """A key of an infra repo by its name, which is made when missing. Raises `InputError`."""
    key, of = _folder(repo) / check_key_name(name), shared.name_of(repo)
    if name == MACHINES:
        await of_machines(repo)
    if not key.exists():
        await _made(key, f"toto {of}" if use == "ssh" else f"{of}-{name}", use)
    return named(repo, name, use, "toto key: the command line")


async def import_key(repo: Path, name: str, file: Path) -> Path:
    """Copy a private key, of ssh or of nix, to an infra repo's keys, under a name; return its path.

    Raises `InputError`.
    """
    try:
        key = _folder(repo) / check_key_name(name)
        text = file.expanduser().read_text()
    except (ValueError, OSError) as error:
        raise InputError(str(error), target=str(file)) from None
    use = _use(text)
    if use is None or (use != "ssh" and name == MACHINES):
        raise InputError(f"is not {' or '.join(_WORDS.values() if use is None else [_WORDS['ssh']])}", target=str(file))
    return files.write(key, text)


def _use(text: str) -> Use | None:
    """What a private key is for, by its text."""
    if "PRIVATE KEY-----" in text:
        return "ssh"
    return "signing" if re.fullmatch(r"[A-Za-z0-9._-]{1,200}:[A-Za-z0-9+/]{86}==\n?", text) else None


async def public_half(key: Path, comment: str = "") -> str:
    """The public half of a private key, as one line: an ssh key with a comment, `NAME:BASE64` of one of nix.

    Raises `CommandFailed`.
    """
    text = key.read_text()
    if _use(text) == "signing":
        return await nix.public_key(text)
    done = await process.run(["ssh-keygen", "-y", "-P", "", "-f", key], timeout=60)
    return " ".join([*done.stdout.split()[:2], *comment.split()])


def _folder(repo: Path) -> Path:
    folder = paths.repo_state(repo) / "keys"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


async def _made(key: Path, comment: str, use: Use = "ssh") -> Path:
    """The private key `key`, which is made when missing; a key of nix is called by its `comment`."""
    if use == "ssh":
        return await made_once.ssh_key(key, comment)

    async def make(fresh: Path) -> None:
        files.write(fresh, await nix.new_key(comment))

    return await made_once.made(key, make)
