"""Who may do what on the git host: the rules, in `access.toml` on the branch main of the repository `toto-admin`.

The newest commit of that repository counts, so a push to it changes the rules at once; its pre-receive hook
(`toto.git_host.receive`) refuses wrong rules. This module runs at every login, so it imports little: no Prefect, no
pydantic, and asyncio only when git has to run. (The idea is gitolite's, without its language.)
"""

import base64
import binascii
import contextlib
import re
import shlex
import tomllib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from toto.base import files
from toto.base.errors import InputError
from toto.base.without_git import without_git

if TYPE_CHECKING:
    from toto.base.process import Completed

ADMIN: Final = "toto-admin"
FILE: Final = "access.toml"
BRANCH: Final = "refs/heads/main"
EVERYONE: Final = "*"
LARGEST: Final = 1 << 20  # bytes of the file
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}")
_KEY: Final = re.compile(r"((?:ssh|ecdsa|sk)-[a-z0-9@.-]+) ([A-Za-z0-9+/]+=*)(?: [^\x00-\x1f\x7f]*)?")

USER_VARIABLE: Final = "TOTO_USER"  # tells the hooks who pushes; without it somebody pushes on toto itself

Right: TypeAlias = Literal["read", "rehearse", "deploy", "approve", "admin"]
RIGHTS: Final[tuple[Right, ...]] = get_args(Right)
_GIVEN_BY: Final[Mapping[Right, tuple[Right, ...]]] = {
    "read": RIGHTS,
    "rehearse": ("rehearse", "deploy", "admin"),
    "deploy": ("deploy", "admin"),
    "approve": ("approve", "admin"),
    "admin": ("admin",),
}
_OF_A_CREATOR: Final[tuple[Right, ...]] = ("read", "rehearse", "deploy")
_OLD_DEPLOY: Final = "write"  # the name of `deploy` in 0.1.0


class AccessError(InputError):
    """The rules have mistakes, or there are none. `problems` holds one line for each: `file:line: what`."""

    def __init__(self, problems: Iterable[str], hint: str | None = None) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems), hint=hint)


@dataclass(frozen=True)
class Allowed:
    """The users who are given each right to a repository.

    `rehearse`: push any branch but the deployed one, and have it rehearsed or planned. `deploy`: push the deployed
    branch. `approve`: answer for a run that asks. `admin`: all of it, and what the repository accepts.
    """

    read: frozenset[str] = frozenset()
    rehearse: frozenset[str] = frozenset()
    deploy: frozenset[str] = frozenset()
    approve: frozenset[str] = frozenset()
    admin: frozenset[str] = frozenset()

    def having(self, right: Right) -> frozenset[str]:
        """The users who have a right, also by a right that includes it."""
        return frozenset().union(*(getattr(self, each) for each in _GIVEN_BY[right]))


@dataclass(frozen=True)
class Rules:
    """`users` has the public keys of each user; `repos` says by repository who may do what with it.

    `create` names those who may create repositories besides those who may change these rules.
    """

    users: Mapping[str, tuple[str, ...]]
    create: frozenset[str] = frozenset()
    repos: Mapping[str, Allowed] = field(default_factory=dict)

    def may(self, user: str, right: Right, repo: str, creator: str | None = None) -> bool:
        """Whether `user` has a right to `repo`.

        The repository's own table decides. Without one its `creator` may deploy, and the table `*` decides for
        everybody else; but it does not count for the repository of the rules. Who may deploy that one administers it:
        they could give themselves every right.
        """
        if user not in self.users:
            return False
        allowed = self.repos.get(repo)
        if repo == ADMIN:
            right = "deploy" if right in ("admin", "approve") else right
            allowed = allowed or Allowed()
        elif allowed is None:
            if user == creator and right in _OF_A_CREATOR:
                return True
            allowed = self.repos.get(EVERYONE, Allowed())
        return bool(allowed.having(right) & {user, EVERYONE})

    def may_create(self, user: str) -> bool:
        """Whether `user` may create repositories."""
        return self.may(user, "admin", ADMIN) or (user in self.users and bool(self.create & {user, EVERYONE}))

    def authorized_keys(self, command: Iterable[str]) -> str:
        """The lines of an authorized_keys file: each key may only run `command` with the name of its user."""
        shell = shlex.join(command).replace("\\", "\\\\").replace('"', '\\"')
        return "".join(
            f'command="{shell} {user}",restrict {key}\n' for user, keys in self.users.items() for key in keys
        )

    def allowed_signers(self, right: Right, repo: str, creator: str | None = None) -> str:
        """The lines of an ssh allowed-signers file: the keys of those who have a right to `repo`."""
        return "".join(
            f'{user} namespaces="git" {key}\n'
            for user, keys in self.users.items()
            if self.may(user, right, repo, creator)
            for key in keys
        )


def repo_name(text: str, repos: Path) -> str:
    """The name of the repository that git asks for as `infra`, `infra.git`, `/infra`, `~/infra` or its path in `repos`.

    Raises `InputError` for everything else, such as a path that leads out of `repos`.
    """
    name = text.removeprefix(f"{repos}/").removeprefix("~/").removeprefix("/").removesuffix("/").removesuffix(".git")
    return check_name(name, text)


def check_name(name: str, shown: str | None = None) -> str:
    """Return `name` if it can name a repository; else raise `InputError`, which shows `shown` if given."""
    if not _NAME.fullmatch(name) or ".." in name or name.endswith((".", ".git", ".lock")):
        raise InputError(
            f"{ascii(shown or name)[:80]} does not name a repository",
            hint="a name has letters, digits, '.', '_' and '-', begins with a letter or a digit, "
            "and has no folder: toto:infra",
        )
    return name


def path_of(repos: Path, name: str) -> Path:
    """The path of the repository `name`."""
    return repos / f"{name}.git"


def check_user(user: str) -> str:
    """Return `user` if it can name a user; else raise `InputError`."""
    if not _USER.fullmatch(user):
        raise InputError(
            f"{ascii(user)[:60]} is not a user's name", hint="use up to 32 letters, digits, '.', '_' and '-'"
        )
    return user


def check_key(text: str) -> str:
    """Return a public key without its comment. Raises ValueError, which says what is wrong with it."""
    form = _KEY.fullmatch(text.strip())
    if form is None:
        raise ValueError("is not a public key like 'ssh-ed25519 AAAA… comment'")
    try:
        data = base64.b64decode(form[2], validate=True)
    except binascii.Error:
        data = b""
    parts: list[bytes] = []  # each follows its length in 4 bytes (RFC 4253)
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        parts.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(data) or parts[:1] != [form[1].encode()]:
        raise ValueError(f"is not a complete {form[1]} key: was it cut off when it was copied?")
    return f"{form[1]} {form[2]}"


def parse(text: str) -> Rules:
    """The rules in the text of an `access.toml`. Raises `AccessError` with all mistakes."""
    if len(text) > LARGEST:
        raise AccessError([f"{FILE}:1: is larger than {LARGEST >> 20} MiB"])
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        found = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        line = int(found[1]) if found and found[1] else text.count("\n") + 1
        what = str(error).removesuffix(found[0]).strip() if found else str(error)
        raise AccessError([f"{FILE}:{line}: is not TOML: {what[:1].lower()}{what[1:]}"]) from None
    reading = _Reading(text)
    rules = reading.rules(data)
    if reading.problems:
        raise AccessError(what for _, what in sorted(reading.problems))
    return rules


class _Reading:
    """One reading of the file, and the mistakes that were found."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.problems: list[tuple[int, str]] = []

    def problem(self, needle: str, what: str, within: str = "") -> None:
        """Note a problem in the first line that has `needle`, searched from the first line that has `within`."""
        start = next((at for at, line in enumerate(self.lines) if within in line), 0)
        line = next((at for at, line in enumerate(self.lines) if at >= start and needle in line), start) + 1
        self.problems.append((line, f"{FILE}:{line}: {what}"))

    def rules(self, data: Mapping[str, Any]) -> Rules:
        for key in data.keys() - {"users", "create", "repos"}:
            self.problem(key, f"{key}: is not known here; known are users, create and repos")
        users = dict(self.users(data.get("users", {})))
        create = self.names(data.get("create", []), "create", users)
        repos = dict(self.repos(data.get("repos", {}), users))
        if not repos.get(ADMIN, Allowed()).having("deploy"):
            self.problem(
                "[repos",
                f"nobody may deploy {ADMIN}, so nobody could change these rules again: "
                f"give [repos.{ADMIN}] its `admin`",
            )
        return Rules(users, create, repos)

    def users(self, table: object) -> Iterator[tuple[str, tuple[str, ...]]]:
        owners: dict[str, str] = {}
        for user, keys in self.table(table, "users"):
            if not _USER.fullmatch(user):
                self.problem(user, f"{user!r}: is not a user's name: letters, digits, '.', '_' and '-'", "[users")
            elif not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                self.problem(user, f"{user}: should be a list of public keys", "[users")
            else:
                yield user, tuple(self.keys(user, keys, owners))

    def keys(self, user: str, keys: list[str], owners: dict[str, str]) -> Iterator[str]:
        for text in keys:
            try:
                key = check_key(text)
            except ValueError as error:
                self.problem(text, f"{user}: {text[:40]!r} {error}", "[users")
                continue
            if (other := owners.setdefault(key, user)) != user:
                self.problem(key, f"{user}: has the same key as {other}: a key identifies one user", f"{user} ")
            yield key

    def repos(self, table: object, users: Mapping[str, object]) -> Iterator[tuple[str, Allowed]]:
        for repo, fields in self.table(table, "repos"):
            try:
                name = repo if repo == EVERYONE else check_name(repo)
            except InputError:
                self.problem(repo, f"{repo!r}: does not name a repository", "[repos")
                continue
            found = dict(self.table(fields, f"repos.{name}"))
            for key in found.keys() - {*RIGHTS, _OLD_DEPLOY}:
                self.problem(
                    key, f"{name}: {key}: is not known here; known are {', '.join(RIGHTS[:-1])} and {RIGHTS[-1]}", name
                )
            given = {right: self.names(found.get(right, []), right, users, name) for right in (*RIGHTS, _OLD_DEPLOY)}
            given["deploy"] |= given.pop(_OLD_DEPLOY)
            yield name, Allowed(**given)

    def names(self, value: object, what: str, users: Mapping[str, object], repo: str = "") -> frozenset[str]:
        label = f"{repo}: {what}" if repo else what
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.problem(what, f'{label}: should be a list of users, such as ["alice"]', repo)
            return frozenset()
        for name in set(value) - users.keys() - {EVERYONE}:
            self.problem(f'"{name}"', f"{label}: there is no user {name!r} in [users]", repo)
        return frozenset(value)

    def table(self, value: object, what: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            yield from value.items()
        else:
            self.problem(what, f"{what}: should be a table, [{what}]")


def creator(repo: Path) -> str | None:
    """The user who created a repository, or None when it was created on toto itself."""
    file = repo / "toto" / "creator"
    return file.read_text() if file.exists() else None


async def may(repos: Path, user: str | None, right: Right, name: str) -> bool:
    """Whether `user` has a right to the repository `name`; None, who works on toto itself, has all of them.

    Raises `AccessError` when there are no rules.
    """
    if user is None:
        return True
    rules = remembered(repos) or await in_force(repos)
    return rules.may(user, right, name, creator(path_of(repos, name)))


def remembered(repos: Path) -> Rules | None:
    """The rules of `repos`, without running git: None unless `in_force` has already read those of the newest commit."""
    admin = path_of(repos, ADMIN)
    try:
        commit, _, text = (admin / "toto" / "rules").read_text().partition("\n")
        newest = (admin / BRANCH).read_text().strip()
        return parse(text) if commit == newest else None
    except (OSError, UnicodeDecodeError, AccessError):
        return None


async def in_force(repos: Path) -> Rules:
    """The rules of `repos`: the newest without mistakes. Raises `AccessError` when there are none."""
    admin = path_of(repos, ADMIN)
    wrong: AccessError | None = None
    async for commit, text in _versions(admin):
        try:
            rules = parse(text)
        except AccessError as error:  # not pushed: the hook would have refused it. The last good one counts
            wrong = wrong or error
            continue
        if wrong is None:
            _remember(admin, commit, text)
        return rules
    raise wrong or AccessError([f"{admin} has no {FILE}"], hint=f"toto repo admin USER KEY.pub --repos {repos}")


async def _versions(admin: Path) -> AsyncIterator[tuple[str, str]]:
    """The commits and their texts of the rules, newest first, at most 50."""
    newest = await git(admin, "rev-parse", "--verify", "--quiet", BRANCH, check=False)
    revisions = newest.stdout.split()
    for number in range(50):
        if number == 1:  # only when the newest one has mistakes
            revisions += (await git(admin, "rev-list", "--max-count=50", BRANCH, "--", FILE)).lines
        if number == len(revisions):
            return
        done = await git(admin, "cat-file", "blob", f"{revisions[number]}:{FILE}", check=False)
        if done.status == 0:
            yield revisions[number], done.stdout


def _remember(admin: Path, commit: str, text: str) -> None:
    file = admin / "toto" / "rules"
    with contextlib.suppress(OSError):  # then git runs again
        file.parent.mkdir(exist_ok=True)
        files.write(file, f"{commit}\n{text}", 0o644)


async def git(repo: Path, *arguments: str, check: bool = True, stdin: str | None = None) -> "Completed":
    """Run git on a repository of the host, without the GIT_DIR and the quarantine of a hook.

    Raises `CommandFailed` when `check`, and `CommandTimeout` after 30 seconds. (`toto.infra_repo.git` can do more, but
    takes too long to import for a login.)
    """
    from toto.base import process  # noqa: PLC0415  (asyncio takes longer than the rest of a login)

    return await process.run(
        ["git", f"--git-dir={repo}", *arguments],
        env=without_git(),
        timeout=30,
        check=check,
        stdin=None if stdin is None else stdin.encode(),
    )
