"""The rules of access: what they allow, and how mistakes in them are reported."""

import base64
import re
import shutil
from pathlib import Path

import pytest

from tests.repos import git
from toto import cli
from toto.base.errors import InputError
from toto.git_host import access
from toto.git_host import host as git_host
from toto.git_host.access import ADMIN, AccessError


def key(seed: str, kind: str = "ssh-ed25519") -> str:
    """Something with the form of a public key."""
    blob = len(kind).to_bytes(4) + kind.encode() + (32).to_bytes(4) + seed.encode().ljust(32, b"\0")
    return f"{kind} {base64.b64encode(blob).decode()}"


RULES = f"""
create = ["alice"]

[users]
alice = ["{key("a1")} alice@laptop", "{key("a2", "sk-ssh-ed25519@openssh.com")}"]
bob = ["{key("b")}"]
guest = []
carol = ["{key("c")}"]

[repos.infra]
read = ["bob"]
write = ["alice"]

[repos.notes]
rehearse = ["guest"]
approve = ["bob"]
admin = ["carol"]

[repos.{ADMIN}]
write = ["alice"]
read = ["guest"]

[repos."*"]
write = ["bob"]
"""


@pytest.mark.parametrize(
    ("user", "right", "repo", "creator", "allowed"),
    [
        ("alice", "deploy", "infra", None, True),  # by the old word `write`
        ("alice", "rehearse", "infra", None, True),
        ("alice", "read", "infra", None, True),
        ("alice", "approve", "infra", None, False),
        ("alice", "admin", "infra", None, False),
        ("bob", "read", "infra", None, True),
        ("bob", "rehearse", "infra", None, False),
        ("bob", "deploy", "infra", None, False),
        ("guest", "read", "infra", None, False),
        ("guest", "read", "notes", None, True),
        ("guest", "rehearse", "notes", None, True),
        ("guest", "deploy", "notes", None, False),
        ("guest", "approve", "notes", None, False),
        ("bob", "approve", "notes", None, True),
        ("bob", "deploy", "notes", None, False),
        ("carol", "approve", "notes", None, True),
        ("carol", "deploy", "notes", None, True),
        ("stranger", "read", "notes", None, False),
        ("bob", "deploy", "other", None, True),
        ("alice", "read", "other", None, False),
        ("alice", "deploy", "other", "alice", True),
        ("alice", "approve", "other", "alice", False),
        ("alice", "admin", "other", "alice", False),
        ("bob", "deploy", "infra", "bob", False),  # its own table decides, not its creator
        ("alice", "deploy", ADMIN, None, True),
        ("alice", "admin", ADMIN, None, True),
        ("bob", "read", ADMIN, None, False),  # never by `*`
        ("bob", "deploy", ADMIN, "bob", False),
        ("guest", "read", ADMIN, None, True),
        ("guest", "admin", ADMIN, None, False),
    ],
)
def test_a_repositorys_own_table_decides_then_its_creator_then_the_star(
    user: str, right: access.Right, repo: str, creator: str | None, allowed: bool
) -> None:
    assert access.parse(RULES).may(user, right, repo, creator) is allowed


def test_the_star_gives_nobody_the_rules_themselves() -> None:
    rules = access.Rules({"bob": ()}, repos={"*": access.Allowed(admin=frozenset({"*"}))})
    assert rules.may("bob", "admin", "infra") and not rules.may("bob", "read", ADMIN)


def test_repositories_are_created_by_those_who_may_change_the_rules_and_those_whom_create_names() -> None:
    rules = access.parse(RULES)
    assert [user for user in rules.users if rules.may_create(user)] == ["alice"]
    rules = access.parse(RULES.replace('create = ["alice"]', 'create = ["bob"]'))
    assert [user for user in (*rules.users, "stranger") if rules.may_create(user)] == ["alice", "bob"]


def test_authorized_keys_run_the_shell_and_nothing_else() -> None:
    lines = access.parse(RULES).authorized_keys(["/opt/a b/python", '"x"']).splitlines()
    assert lines[0] == f"""command="'/opt/a b/python' '\\"x\\"' alice",restrict {key("a1")}"""
    assert len(lines) == 4 and all(",restrict s" in line for line in lines)


def test_signers_are_those_who_have_the_right() -> None:
    rules = access.parse(RULES)
    for right, repo, users in (
        ("deploy", "infra", ["alice", "alice"]),
        ("deploy", "other", ["bob"]),
        ("deploy", "notes", ["carol"]),
        ("approve", "notes", ["bob", "carol"]),
    ):
        lines = rules.allowed_signers(right, repo).splitlines()  # type: ignore[arg-type]
        assert [line.split()[0] for line in lines] == users


ADMIN_TABLE = f'[repos.{ADMIN}]\nwrite = ["*"]\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[users\n", "access.toml:1: is not TOML: expected"),
        (ADMIN_TABLE + "\nx = ", "access.toml:4: is not TOML"),
        ("", f"access.toml:1: nobody may deploy {ADMIN}"),
        ("[users]\nalice = []\n[repos.toto-admin]\nrehearse = ['alice']\n", f"nobody may deploy {ADMIN}"),
        (ADMIN_TABLE + "[user]\n", "access.toml:3: user: is not known here"),
        (ADMIN_TABLE + "[users]\nalice = 'x'\n", "access.toml:4: alice: should be a list of public keys"),
        (ADMIN_TABLE + "[users]\n\nalice = ['x']\n", "access.toml:5: alice: 'x' is not a public key like"),
        (ADMIN_TABLE + f"[users]\nalice = ['{key('a')[:-8]}']\n", "access.toml:4: alice: 'ssh-ed25519"),
        (ADMIN_TABLE + f"[users]\nalice = ['{key('a').replace('ed25519', 'rsa', 1)}']\n", "not a complete ssh-rsa key"),
        (
            ADMIN_TABLE + f"[users]\nalice = ['{key('a')}']\nbob = ['{key('a')} same']\n",
            "access.toml:5: bob: has the same",
        ),
        (ADMIN_TABLE + "[users]\n'a b' = []\n", "access.toml:4: 'a b': is not a user's name"),
        (ADMIN_TABLE + '[users]\n"x\\n" = []\n', "is not a user's name"),
        ("create = ['eve']\n" + ADMIN_TABLE, "access.toml:1: create: there is no user 'eve'"),
        (ADMIN_TABLE + '[repos.infra]\n\nwrite = ["eve"]\n', "access.toml:5: infra: write: there is no user 'eve'"),
        (ADMIN_TABLE + "[repos.infra]\nwirte = []\n", "access.toml:4: infra: wirte: is not known here"),
        (ADMIN_TABLE + '[repos.infra]\nwrite = "alice"\n', "access.toml:4: infra: write: should be a list"),
        (ADMIN_TABLE + '[repos."../etc"]\n', "access.toml:3: '../etc': does not name a repository"),
        ("repos = 1\n", "access.toml:1: repos: should be a table"),
        ("x = " + "[" * 5000, "access.toml:1: is not TOML"),
        ("#" * (access.LARGEST + 1), "is larger than 1 MiB"),
    ],
)
def test_mistakes_are_reported_with_their_line(text: str, complaint: str) -> None:
    with pytest.raises(AccessError) as wrong:
        access.parse(text)
    assert complaint in str(wrong.value)
    assert all(line.startswith("access.toml:") for line in wrong.value.problems)


@pytest.mark.parametrize(
    "evil",
    [f'{key("a")} c",command="sh', f"{key('a')}\nssh-rsa AAAA", 'command="sh" ' + key("a"), f"restrict {key('a')}"],
)
def test_a_key_cannot_smuggle_options_into_authorized_keys(evil: str) -> None:
    text = f"{ADMIN_TABLE}[users]\nalice = [{evil!r}]\n"
    try:
        printed = access.parse(text).authorized_keys(["shell"])
    except AccessError:
        return
    assert printed == f'command="shell alice",restrict {key("a")}\n'


REPOS = Path("/srv/repos")


@pytest.mark.parametrize(
    "asked", ["infra", "infra.git", "/infra", "~/infra", "/infra.git/", "/srv/repos/infra", "/srv/repos/infra.git"]
)
def test_what_git_sends_for_a_repository(asked: str) -> None:
    assert access.repo_name(asked, REPOS) == "infra"


@pytest.mark.parametrize(
    "asked",
    [
        "",
        ".",
        "..",
        "../infra",
        "/srv/repos/../x",
        "/srv/repos/",
        "/etc/passwd",
        "a/b",
        "-infra",
        "--upload-pack=x",
        ".git",
        ".new/x",
        "~bob/infra",
        "~",
        "/~/infra",
        "//infra",
        "infra\n",
        "in fra",
        "infra;id",
        "$(id)",
        "ïnfra",
        "a..b",
        "infra.git.git",
        "infra.lock",
        "x" * 64,
        "\0",
    ],
)
def test_names_that_lead_elsewhere_are_refused(asked: str) -> None:
    with pytest.raises(InputError, match="does not name a repository"):
        access.repo_name(asked, REPOS)


async def test_newest_rules_that_are_right_are_in_force(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match=r"toto repo admin USER KEY\.pub"):
        await access.in_force(tmp_path)
    admin = await git_host.make_admin(tmp_path, "alice", key("a"))
    assert set((await access.in_force(tmp_path)).users) == {"alice"}
    work = tmp_path / "work"
    git("clone", "--quiet", admin, work, cwd=tmp_path)
    good = (work / "access.toml").read_text()
    for text in (good.replace("[users]", f'[users]\nbob = ["{key("b")}"]'), "no toml", ""):
        (work / "access.toml").write_text(text)
        git("commit", "--quiet", "--all", "-m", "x", cwd=work)
    git("fetch", "--quiet", work, "+HEAD:main", cwd=admin)  # not through the hook, which would refuse it
    assert set((await access.in_force(tmp_path)).users) == {"alice", "bob"}
    git("rm", "--quiet", "access.toml", cwd=work)
    git("commit", "--quiet", "-m", "x", cwd=work)
    git("fetch", "--quiet", work, "+HEAD:main", cwd=admin)
    assert set((await access.in_force(tmp_path)).users) == {"alice", "bob"}


async def test_rules_that_git_has_read_are_remembered_until_they_change(tmp_path: Path) -> None:
    admin = await git_host.make_admin(tmp_path, "alice", key("a"))
    assert access.remembered(tmp_path) is None
    rules = await access.in_force(tmp_path)
    assert access.remembered(tmp_path) == rules
    (admin / "toto" / "rules").write_bytes((admin / "toto" / "rules").read_bytes()[:-20])
    assert access.remembered(tmp_path) is None
    await access.in_force(tmp_path)
    for text in (RULES, "no toml"):
        git("clone", "--quiet", admin, tmp_path / "work", cwd=tmp_path)
        (tmp_path / "work" / "access.toml").write_text(text)
        git("commit", "--quiet", "--all", "-m", "x", cwd=tmp_path / "work")
        git("fetch", "--quiet", tmp_path / "work", "+HEAD:main", cwd=admin)
        shutil.rmtree(tmp_path / "work")
        assert access.remembered(tmp_path) is None
        assert await access.in_force(tmp_path) == access.parse(RULES)
    assert access.remembered(tmp_path) is None


async def test_rules_are_made_once_and_with_a_real_key(tmp_path: Path) -> None:
    for user, public in (("a b", key("a")), ("alice", "AAAA"), ("alice", f"{key('a')}\n{key('b')}")):
        with pytest.raises(InputError):
            await git_host.make_admin(tmp_path, user, public)
    assert not list(tmp_path.glob("*.git"))
    await git_host.make_admin(tmp_path, "alice", f"{key('a')} alice@laptop\n")
    with pytest.raises(InputError, match="exists already"):
        await git_host.make_admin(tmp_path, "eve", key("e"))
    assert set((await access.in_force(tmp_path)).users) == {"alice"}


async def test_new_repository_is_whole_or_not_there(tmp_path: Path) -> None:
    await git_host.remember(tmp_path, git_host.Served(api_url="http://127.0.0.1:1/api", branch="live", auth="a:b"))
    (tmp_path / ".new" / "infra.git" / "left by a kill").mkdir(parents=True)
    repo = await git_host.make(tmp_path, "infra", creator="alice")
    assert all((repo / "hooks" / hook).stat().st_mode & 0o100 for hook in ("pre-receive", "post-receive"))
    assert await git_host.deployed_branch(repo) == "live"
    assert access.creator(repo) == "alice"
    assert git_host.infra_repos(tmp_path) == [repo]
    assert (tmp_path / "server.json").stat().st_mode & 0o777 == 0o600
    await git_host.set_policy(repo, branch="main", signed=True)
    await git_host.make(tmp_path, "infra")  # again: its policy stays
    assert await git_host.deployed_branch(repo) == "main"
    assert (await git_host.policy_of(repo)).signed
    with pytest.raises(InputError):
        await git_host.make(tmp_path, "../infra")
    with pytest.raises(InputError, match="rules"):
        await git_host.make(tmp_path, ADMIN)


def test_the_operators_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def toto(*words: str | Path) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["toto", "repo", *map(str, words), "--repos", str(tmp_path / "repos")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    (tmp_path / "key.pub").write_text(f"{key('a')} alice@laptop\n")
    assert toto("admin", "alice", tmp_path / "key.pub")[0] == 0
    status, said, _ = toto("create", "infra", "--signed", "--max-file-size", "5m", "--gpg-home", tmp_path)
    assert status == 0 and re.search(r"max-file-size +5242880\b", said) and re.search(r"signed +True\b", said)
    status, said, _ = toto("set", "infra", "--no-signed", "--gpg-home", "", "--branch", "live")
    assert re.search(r"signed +False\b", said) and re.search(r"gpg-home +None\b", said)
    assert (tmp_path / "repos" / "infra.git" / "HEAD").read_text() == "ref: refs/heads/live\n"
    for words, complaint in (
        (("set", "infra", "--max-file-size", "many"), "is not a file size"),
        (("set", "infra", "--branch", "a b"), "is not a branch name"),
        (("set", "other"), "there is no repository other\nnext: `toto repo create other` makes it"),
        (("create", "../x"), "does not name a repository"),
        (("create", ADMIN), "holds the rules of access"),
        (("admin", "bob", tmp_path / "none.pub"), "cannot be read"),
        (("admin", "bob", tmp_path / "key.pub"), "exists already"),
    ):
        status, _, said = toto(*words)
        assert status == 2 and complaint in said, (words, said)
