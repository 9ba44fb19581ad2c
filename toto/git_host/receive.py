"""The pre-receive hook of toto's repositories, and the policy that it enforces: what a push may contain.

It sees the pushed objects in git's quarantine, before any ref has moved, and the pusher reads what it prints. git
verifies the signatures. The pusher waits for it, so it imports no Prefect, and pydantic only when the push changes the
manifest or the settings. `toto.git_host.access` decides who may push; the post-receive hook starts the run.
"""

import asyncio
import contextlib
import difflib
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Self

from toto.base import process
from toto.base.errors import TotoError
from toto.base.process import Completed, LineSink
from toto.base.without_git import without_git
from toto.git_host import access, signatures
from toto.infra_repo import contents
from toto.infra_repo.contents import LINK, SETTINGS

OPTIONS: Final[Mapping[str, str]] = {
    "plan": "print what would change, and start nothing",
    "wait": "print the progress and the end of the run",
    "only=web1,web2": "limit it to these hosts or tags",
    "skip": "accept the push, and start nothing",
    "rehearse": "rehearse, and roll nothing out; works for every branch",
    "accept=web1": "first take what is there of it as good: it cannot be put back",
    "reason=TEXT": "why that is accepted",
}
MANIFEST: Final = "machines.yaml"
MAX_FILE_SIZE: Final = 100 << 20  # bytes
_LONGEST_REASON: Final = 300  # characters
_ONLY: Final = re.compile(r"[A-Za-z0-9._:@/+-]+(,[A-Za-z0-9._:@/+-]+)*")
# git sets these for a hook, so that git in the hook finds the repository and the pushed objects.
_QUARANTINE: Final = ("GIT_DIR", "GIT_QUARANTINE_PATH", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES")
_TWIN: Final[Mapping[str, str]] = {"heads": "tags", "tags": "heads"}
_RESERVED: Final = re.compile(r"@|([A-Z]+_)*HEAD|refs/.*|[0-9a-f]{7,64}")  # git's own names, and those of commits
_at_once: Final = asyncio.Semaphore(8)  # git processes; a push may have a thousand branches
_MOST_FILES: Final = 200_000  # of a commit with more, no names are looked for
_MOST_KNOWN: Final = 12  # names that are told when none is close
_MOST_NAMED: Final = 5  # commits or files of one kind; the rest is counted


@dataclass(frozen=True)
class Policy:
    """What a repository accepts, by the keys `toto.*` of its git config.

    `branch` is the deployed branch. `max_file_size` is in bytes; 0 means no limit. ssh signatures are trusted by the
    file `allowed_signers`, or without it if they are by a user who may deploy (on the deployed branch) or rehearse (on
    the others). gpg signatures are trusted by the keyring in `gpg_home`, if gpg trusts the key; without it none is.
    """

    branch: str | None = None
    signed: bool = False
    allow_force: bool = False
    max_file_size: int = MAX_FILE_SIZE
    allowed_signers: str | None = None
    gpg_home: str | None = None
    rules: bool = False

    @classmethod
    def of(cls, config: str) -> Self:
        """The policy in the output of `git config --null --get-regexp ^toto`. Raises ValueError for a bad size."""
        found: dict[str, str] = {}
        for entry in config.split("\0"):
            key, _, value = entry.partition("\n")
            found[key.removeprefix("toto.")] = value if "\n" in entry else "true"
        return cls(
            branch=found.get("branch"),
            signed=_is_true(found.get("signed")),
            allow_force=_is_true(found.get("allowforce")),
            rules=_is_true(found.get("rules")),
            max_file_size=size(found.get("maxfilesize", str(MAX_FILE_SIZE))),
            allowed_signers=found.get("allowedsigners"),
            gpg_home=found.get("gpghome"),
        )


def size(text: str) -> int:
    """The bytes in `text`, a number that may have git's suffix k, m or g. Raises ValueError for anything else."""
    form = re.fullmatch(r"(\d{1,12})([kmg]?)", text.strip().lower())
    if form is None:
        raise ValueError(f"{process.shorten(repr(text), 40)} is not a file size: use a number, or one with k, m or g")
    return int(form[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[form[2]]


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in {"true", "yes", "on", "1"}


@dataclass(frozen=True)
class Update:
    """One ref of a push, with its old and its new commit. All zeros mean that there is none."""

    old: str
    new: str
    ref: str

    @property
    def creates(self) -> bool:
        return not self.old.strip("0")

    @property
    def deletes(self) -> bool:
        return not self.new.strip("0")

    @property
    def branch(self) -> str | None:
        """The name of the branch, or None when the ref is not a branch."""
        return self.ref.removeprefix("refs/heads/") if self.ref.startswith("refs/heads/") else None

    @property
    def base(self) -> str:
        """What the new commit is compared with: the old commit, or git's empty tree."""
        if not self.creates:
            return self.old
        return (
            "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
            if len(self.old) == 40
            else "6ef19b41225c5369f1c104d45d8d85efa9b057b53b14b4b9b939dd74decc5321"
        )


def main() -> NoReturn:
    """Run the hook: standard input has one update on each line; status 1 refuses the whole push."""
    updates = [Update(*line.split(" ", 2)) for line in sys.stdin.read().splitlines()]
    options = [
        os.environ.get(f"GIT_PUSH_OPTION_{number}", "")
        for number in range(int(os.environ.get("GIT_PUSH_OPTION_COUNT", "0")))
    ]
    try:
        refusals = asyncio.run(judge(Path.cwd(), updates, options, os.environ.get(access.USER_VARIABLE)))
    except (TotoError, ValueError, OSError) as error:
        refusals = [str(error)]
    for line in "\n".join(refusals).splitlines():
        print(f"toto: {line}")
    if refusals:
        print("toto: nothing was accepted")
    sys.exit(bool(refusals))


async def judge(repo: Path, updates: Sequence[Update], options: Sequence[str], user: str | None = None) -> list[str]:
    """Why the push is refused, in words for the pusher; empty when it is accepted. `repo` is the hook's repository.

    `user` is the pusher, who may push at all; None on toto itself, where everything is allowed.
    """
    done = await _git("config", "--null", "--get-regexp", "^toto[.]", check=False)
    policy = Policy.of(done.stdout)
    if wrong := list(wrong_options(options)) or _out_of_place(options, updates, policy):
        return wrong
    if forbidden := await _beyond_rights(updates, policy, repo, user) or await _misleading(updates):
        return forbidden
    for update in updates:
        if not update.ref.startswith(("refs/heads/", "refs/tags/")):
            return [f"{update.ref} is neither a branch nor a tag"]  # refs/replace would replace the content of commits
        if update.ref.startswith("refs/tags/toto/"):
            return [f"{update.ref} belongs to toto: it names what was deployed"]
    checks = [_too_large(updates, policy)] if policy.max_file_size else []
    only = [word for each in options if each.startswith("only=") for word in each[5:].split(",")]
    for update in updates:
        starts = update.branch == policy.branch or {"plan", "rehearse"} & {*options}
        if only and starts and update.branch is not None and not update.deletes:
            checks.append(_unknown(update, only))
        if update.branch is not None and update.branch == policy.branch:
            checks += [_taken_away(update, policy, repo)] if not update.creates else []
            if not update.deletes:
                checks += [_wrong_rules(update)] if policy.rules else [_wrong_files(update), _unfinished(update, repo)]
        if policy.signed and update.branch is not None and not update.deletes:
            checks.append(_untrusted(update, policy, repo))
    return [line for found in await asyncio.gather(*checks) for line in found]


def wrong_options(options: Sequence[str]) -> Iterator[str]:
    """What is wrong with the options of a push; for an unknown one, also the known ones."""
    wrong = [
        option
        for option in options
        if option not in {"plan", "wait", "skip", "rehearse"}
        and not (option.startswith(("only=", "accept=")) and _ONLY.fullmatch(option.partition("=")[2]))
        and not option.startswith("reason=")
    ]
    reasons = [option.removeprefix("reason=") for option in options if option.startswith("reason=")]
    accepts = any(option.startswith("accept=") for option in options)
    for option in wrong:
        known = [each.partition("=")[0] for each in OPTIONS]
        meant = difflib.get_close_matches(option.partition("=")[0].lower(), known, n=1)
        close = f": did you mean {meant[0]}?" if meant and not option.startswith(f"{meant[0]}=") else ""
        yield f"the push option {process.shorten(ascii(option), 80)} is not known{close}"
    if "skip" in options and len(set(options)) > 1:
        yield "the push option skip starts nothing: no other option goes with it"
    elif {"plan", "rehearse"} <= set(options):
        yield "the push options plan and rehearse do not go together: a rehearsal begins with a plan"
    elif accepts != bool(reasons) or len(reasons) > 1:
        yield "the push options accept=TARGET and reason=TEXT go together, with one reason"
    elif accepts and {"plan", "rehearse"} & set(options):
        yield "the push option accept goes with a push that is deployed, not with plan or rehearse"
    for reason in reasons:
        if not (reason.strip() and reason.isprintable() and len(reason) <= _LONGEST_REASON) or {'"', "\\"} & {*reason}:
            yield f'the reason should be one line of up to {_LONGEST_REASON} characters, without " and \\'
    if wrong:
        yield "known are:"
        yield from (f"  -o {option:<15} {meaning}" for option, meaning in OPTIONS.items())


def _out_of_place(options: Sequence[str], updates: Sequence[Update], policy: Policy) -> list[str]:
    """What is wrong with options that are right elsewhere."""
    if options and policy.rules:
        return [f"a push to {access.ADMIN} takes no option: it deploys nothing"]
    deploys = any(each.branch is not None and each.branch == policy.branch and not each.deletes for each in updates)
    if not deploys and any(option.startswith("accept=") for option in options):
        return [f"the push option accept goes with a push of the deployed branch, {policy.branch}"]
    return []


async def _beyond_rights(updates: Sequence[Update], policy: Policy, repo: Path, user: str | None) -> list[str]:
    """What only those may push who may deploy: the deployed branch, and tags that are there already.

    (People start runs by the names of tags, so a tag stays what it was. A push option gives no right: what it starts
    besides a deployment of the deployed branch only plans or rehearses.)
    """
    name = repo.name.removesuffix(".git")
    for update in updates:
        deployed = update.branch is not None and update.branch == policy.branch
        moved_tag = update.ref.startswith("refs/tags/") and not update.creates
        if (deployed or moved_tag) and not await access.may(repo.parent, user, "deploy", name):
            what = "its deployed branch" if deployed else "a tag that is there already"
            return [
                f"{user} may rehearse {name}, but not deploy it: {update.ref.split('/', 2)[2]} is {what}",
                "next: git push -o rehearse toto HEAD:refs/heads/SOMETHING-ELSE, "
                f"or ask someone who may deploy {name} to push it",
            ]
    return []


async def _misleading(updates: Sequence[Update]) -> list[str]:
    """New branches and tags that could be taken for something else when a run is asked for their name."""
    if all(update.deletes for update in updates):
        return []
    done = await _git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/tags")
    after = {*done.lines, *(update.ref for update in updates)} - {each.ref for each in updates if each.deletes}
    for update in updates:
        kind, _, name = update.ref.removeprefix("refs/").partition("/")
        if update.deletes or kind not in _TWIN:
            continue
        if _RESERVED.fullmatch(name):
            return [f"{update.ref}: no branch and no tag can have this name here", "next: use a different name"]
        if update.branch is not None and name.startswith("toto/"):
            return [f"{update.ref} belongs to toto: it could be taken for a tag that says what was deployed"]
        if update.creates and (twin := f"refs/{_TWIN[kind]}/{name}") in after:
            return [
                f"{update.ref} would have the same name as {twin}",
                f"next: use a different name, or first delete the other: git push --delete toto {twin}",
            ]
    return []


async def _taken_away(update: Update, policy: Policy, repo: Path) -> list[str]:
    """Refuse to move the deployed branch other than forward, unless the policy allows it."""
    if policy.allow_force:
        return []
    hint = f"next: to allow it, on toto: toto repo set {repo.name.removesuffix('.git')} --allow-force"
    if update.deletes:
        return [f"{update.branch} is the deployed branch: it cannot be deleted", hint]
    done = await _git("merge-base", "--is-ancestor", update.old, update.new, check=False)
    if done.status == 0:
        return []
    return [
        f"{update.branch} is the deployed branch: a forced push to it is refused, it would lose {update.old[:8]}",
        "next: `git pull` first, or push a commit that reverts what is wrong",
        hint,
    ]


async def _unknown(update: Update, only: Sequence[str]) -> list[str]:
    """Those of the words of `only=` that nothing in the commit is called: no machine, tag, file, folder or setting.

    (The run itself knows better which of them are targets; what cannot be read here is left to it.)
    """
    from toto.infra_repo import manifest  # noqa: PLC0415

    try:
        fleet = manifest.parse((await _git("cat-file", "blob", f"{update.new}:{MANIFEST}", check=False)).stdout)
    except TotoError:
        return []
    names = {word for each in fleet.machines.values() for word in (each.name, *each.tags)}
    known, files = set(names), 0

    def note(path: str) -> None:
        nonlocal files
        files += 1
        for part in path.split("/") if files < _MOST_FILES else ():
            known.update((part, part.partition(".")[0], part.rpartition(".")[0], part.removesuffix("s")))

    await _git("ls-tree", "-r", "--name-only", update.new, on_line=note)
    unknown = [word for word in dict.fromkeys(only) if word.rpartition("/")[2] not in known]
    if not unknown or files >= _MOST_FILES:
        return []
    # What has names and tags of its own. (Which file of a flake names its hosts, only nix knows.)
    texts = (":(glob)**/*.nix", SETTINGS, ":(glob)helm/*/release.yaml")
    words = [part for word in unknown for part in ("-e", word.rpartition("/")[2])]
    found = await _git("grep", "-h", "-F", "-w", *words, update.new, "--", *texts, check=False)
    lost = [word for word in unknown if word.rpartition("/")[2] not in found.stdout]
    return [f"only={word}: nothing in this commit is called so{_meant(word, names)}" for word in lost]


def _meant(word: str, known: Collection[str]) -> str:
    """Which of the known words was meant, as the end of a sentence."""
    if close := difflib.get_close_matches(word, sorted(known), n=1):
        return f": did you mean {close[0]}?"
    some = sorted(known)[:_MOST_KNOWN]
    return f"; machines and tags are {', '.join(some)}{' …' if len(known) > len(some) else ''}" if some else ""


async def _wrong_files(update: Update) -> list[str]:
    """The mistakes in the manifest and the settings, where the push changes them."""
    changed = await _changed(update, MANIFEST, SETTINGS)
    wrong = [f"{MANIFEST}: is gone; without it nothing can be deployed"] if changed.get(MANIFEST) == "" else []
    if update.creates and MANIFEST not in changed:
        wrong = [f"{MANIFEST}: is missing; list the machines in it, or `machines: []`: see docs/manifest.md"]
    there = [name for name, mode in changed.items() if mode not in ("", LINK)]  # the run follows links
    if not there:
        return wrong
    from toto.infra_repo import limits, manifest, settings  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="toto-receive-") as folder:
        await _git(
            "-c",
            "core.hooksPath=/dev/null",
            "restore",
            f"--source={update.new}",
            "--worktree",
            "--",
            *there,
            # (No filter of this machine's or user's that a pushed .gitattributes names.)
            extra={
                "GIT_WORK_TREE": folder,
                "GIT_INDEX_FILE": f"{folder}/.index",
                "GIT_CONFIG_GLOBAL": os.devnull,
                "GIT_CONFIG_NOSYSTEM": "1",
            },
        )
        for name in there:
            text = _text(Path(folder, name), settings.LARGEST)
            try:
                if name == MANIFEST:
                    fleet, where = manifest.load(Path(folder, name)), manifest.places(text)
                    for check in (manifest.check_distinct, limits.check_machines):
                        try:
                            check(fleet, where)
                        except TotoError as error:
                            wrong.append(str(error))
                else:
                    limits.within(settings.load(Path(folder)), text)
            except TotoError as error:
                wrong.append(str(error))
    return wrong


def _text(path: Path, most: int) -> str:
    """The text of a file, or "" where it cannot be read: then it is told why elsewhere."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(most).decode(errors="replace")
    return ""


async def _unfinished(update: Update, repo: Path) -> list[str]:
    """What of the commit would not be deployed as it was meant: submodules, and the like."""
    env = without_git(kept=_QUARANTINE)
    if not await contents.unfinished(repo, update.new, env):
        return []
    settings = await _git("cat-file", "blob", f"{update.new}:{SETTINGS}", check=False)
    return contents.words(await contents.unfinished(repo, update.new, env, contents.allowed(settings.stdout)))


async def _wrong_rules(update: Update) -> list[str]:
    """The mistakes in the pushed rules of access."""
    done = await _git("cat-file", "blob", f"{update.new}:{access.FILE}", check=False)
    if done.status != 0:
        return [f"{access.FILE}: is gone; without it nobody could log in"]
    try:
        access.parse(done.stdout)
    except access.AccessError as error:
        return list(error.problems)
    return []


async def _untrusted(update: Update, policy: Policy, repo: Path) -> list[str]:
    """Those of a branch's new commits whose signature is missing or not trusted."""
    deployed = update.branch == policy.branch
    known = [] if update.creates else [update.old]
    if policy.branch and not deployed and await _is_there(f"refs/heads/{policy.branch}"):
        known.append(f"refs/heads/{policy.branch}")
    bad = await signatures.untrusted(
        _git,
        repo,
        "deploy" if deployed else "rehearse",
        update.new,
        "--not",
        *known,
        allowed_signers=policy.allowed_signers,
        gpg_home=policy.gpg_home,
    )
    return _some(bad, "commits") + (
        [
            "next: sign them with a key that toto trusts: git rebase --exec 'git commit --amend --no-edit -S' "
            f"{update.old[:8] if not update.creates else '--root'}"
        ]
        if bad
        else []
    )


async def _too_large(updates: Sequence[Update], policy: Policy) -> list[str]:
    """The new files that are larger than the limit."""
    fresh = [update.new for update in updates if not update.deletes]
    if not fresh:
        return []
    large: set[str] = set()

    def note(line: str) -> None:
        if line.startswith("~"):
            large.add(line[1:])

    await _git(
        "rev-list",
        "--objects",
        f"--filter=blob:limit={policy.max_file_size + 1}",
        "--filter-print-omitted",
        *fresh,
        "--not",
        "--all",
        on_line=note,
        timeout=600,
    )
    if not large:
        return []
    found: list[str] = []

    def name(line: str) -> None:
        blob, _, path = line.partition(" ")
        if blob in large:
            found.append(f"{ascii(path)[1:-1]} is larger than {policy.max_file_size} bytes")

    await _git("rev-list", "--objects", *fresh, "--not", "--all", on_line=name, timeout=600)
    return [
        *_some(found, "files"),
        "next: remove it from the commits that you push; if a machine needs a file of that size, let nix fetch it",
    ]


async def _changed(update: Update, *names: str) -> dict[str, str]:
    """Those of the files that the push changes, with their new modes; "" for a file that is gone."""
    done = await _git("diff-tree", "-r", "-z", "--raw", "--no-renames", update.base, update.new, "--", *names)
    fields = done.stdout.split("\0")
    return {
        path: "" if about.endswith("D") else about.split(" ")[1]
        for about, path in zip(fields[::2], fields[1::2], strict=False)
        if path in names
    }


async def _is_there(ref: str) -> bool:
    return (await _git("rev-parse", "--verify", "--quiet", ref, check=False)).status == 0


def _some(lines: Sequence[str], what: str) -> list[str]:
    more = len(lines) - _MOST_NAMED
    return [*lines[:_MOST_NAMED], *([f"… and {more} more {what}"] if more > 0 else [])]


async def _git(
    *arguments: str,
    check: bool = True,
    extra: Mapping[str, str] | None = None,
    timeout: float = 60,
    on_line: LineSink | None = None,
) -> Completed:
    """Run git in the hook's repository, where it sees the quarantined objects."""
    async with _at_once:
        return await process.run(
            ["git", *arguments],
            env=without_git(kept=_QUARANTINE) | dict(extra or {}),
            timeout=timeout,
            check=check,
            on_line=on_line,
        )


if __name__ == "__main__":
    main()
