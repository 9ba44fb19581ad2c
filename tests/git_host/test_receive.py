"""What a push may contain: real pushes into a bare repository with toto's pre-receive hook."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.git_host.test_access import key
from tests.git_host.test_host import Pusher
from toto.base import paths, process
from toto.git_host import access, receive
from toto.git_host import host as git_host
from toto.git_host.receive import Policy
from toto.infra_repo import git

GOOD = "machines:\n  web1:\n    address: 10.0.0.1\n"


def write(pusher: Pusher, files: dict[str, str | None]) -> str:
    for name, text in files.items():
        path = pusher.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
    pusher.git("add", "--all")
    return pusher.commit()


def refused(pusher: Pusher, *refspecs: str) -> str:
    """The output of a push that is refused and moves nothing."""
    before = pusher.git("ls-remote", str(pusher.remote))
    done = subprocess.run(
        ["git", "push", str(pusher.remote), *(refspecs or ("main",))],
        cwd=pusher.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0, done.stderr
    assert "toto: nothing was accepted" in done.stderr
    assert pusher.git("ls-remote", str(pusher.remote)) == before
    return done.stderr


def test_mistakes_in_manifest_and_settings_are_reported_with_their_lines(pusher: Pusher) -> None:
    write(
        pusher,
        {
            "machines.yaml": "machines:\n  web1:\n    adress: 10.0.0.1\n  we b: {}\n",
            "toto.toml": "[sandbox]\nmemroy = 3\n",
        },
    )
    lines = (line.removeprefix("remote: ").rstrip() for line in refused(pusher).splitlines())
    assert "\n".join(line for line in lines if line.startswith("toto: ")) == (
        """\
toto: machines.yaml:2: web1: address: is missing
toto: machines.yaml:3: web1: adress: is not a known field; did you mean 'address'?
toto: machines.yaml:4: 'we b': name: should be 1 to 63 letters, digits, '-', '_' and single dots, begin with a letter \
or digit and not end in a dot, not 'we b'
toto: machines.yaml:4: 'we b': address: is missing
toto: toto.toml:2: sandbox.memroy: is not a known field; did you mean 'memory'?
toto: nothing was accepted"""
    )
    write(pusher, {"machines.yaml": GOOD, "toto.toml": "x = \n"})
    said = refused(pusher)
    assert "toto: toto.toml:1: is not TOML" in said and "machines.yaml" not in said
    write(pusher, {"toto.toml": None})
    pusher.push()


async def test_what_is_more_than_the_server_allows_is_refused_with_its_name(
    pusher: Pusher, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook finds the server's rules by the repository's own config: sshd gives it no environment."""
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    (paths.state_home() / "server.toml").write_text('[most]\n"sandbox.test_timeout" = 60\n"machine.cores" = 2\n')
    await git_host.create(repo, api_url="http://127.0.0.1:1/api")
    monkeypatch.delenv("TOTO_STATE")
    write(pusher, {"toto.toml": "[sandbox]\ntest_timeout = 61\nphase_timeout = 600000\n"})
    said = refused(pusher)
    for words in (
        "2: sandbox.test_timeout: 61 is more than the 60",
        "3: sandbox.phase_timeout: 600000 is more than the 14400",
    ):
        assert f"toto: toto.toml:{words} that this server allows (most.sandbox." in said
    write(pusher, {"toto.toml": "[sandbox]\ntest_timeout = 60\n", "machines.yaml": f"{GOOD}    cores: 3\n"})
    assert "toto: machines.yaml:4: web1: cores: 3 is more than the 2 that this server allows" in refused(pusher)
    write(pusher, {"machines.yaml": f"{GOOD}    cores: 2\n"})
    pusher.push()


async def test_a_push_that_is_too_large_or_malformed_is_refused_by_git(
    pusher: Pusher, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    (paths.state_home() / "server.toml").write_text("[push]\nsize = 1000000\n")
    await git_host.create(repo, api_url="http://127.0.0.1:1/api")
    (pusher.folder / "image").write_bytes(os.urandom(1_100_000))
    write(pusher, {})
    assert "pack exceeds maximum allowed size" in refused_by_git(pusher, "main")
    pusher.git("reset", "--quiet", "--hard", "HEAD~1")
    empty = pusher.git("rev-parse", "HEAD^{tree}")
    tree = subprocess.run(
        ["git", "mktree"],
        input=f"040000 tree {empty}\t.git\n",
        text=True,
        cwd=pusher.folder,
        capture_output=True,
        check=True,
    ).stdout.strip()
    commit = pusher.git("commit-tree", "-m", "x", tree)
    assert "hasDotgit" in refused_by_git(pusher, f"{commit}:refs/heads/evil")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_what_would_be_deployed_half_is_refused_by_name(pusher: Pusher) -> None:
    """Submodules, files that stand for others, names that differ by case, links out of the repo."""
    (pusher.folder / "terraform/modules/dns").mkdir(parents=True)
    pusher.git("update-index", "--add", "--cacheinfo", f"160000,{pusher.commit()},terraform/modules/dns")
    for name, to in {
        "hosts/a.nix": "/etc/shadow",
        "helm/b": "../../up",
        "deep/c": "../../../x",
        "d": "/nix/store/x",
    }.items():
        (pusher.folder / name).parent.mkdir(exist_ok=True)
        (pusher.folder / name).symlink_to(to)
    (pusher.folder / "result-web").symlink_to("/nix/store/whatever")
    files: dict[str, str | None] = {
        "modules/dns.tf": LFS,
        "tests/Web1/smoke/a": "x",
        "tests/web1/smoke/a": "x",
        "caf\u00e9": "x",
        "cafe\u0301": "x",
        "secret": "\0GITCRYPT\0xyz",
        "fine": f"not {LFS}",
        "helm/link-within": "x",
    }
    write(pusher, files)
    said = refused(pusher)
    assert "toto: terraform/modules/dns: is a submodule, and toto has only this repository: the folder would" in said
    assert "next: commit its files, for example by `git subtree add`; or, if nothing reads it, name it in" in said
    assert "… and 4 more" in said
    for words in (
        "caf\\xe9: differs from cafe\\u0301 only by case or accents",
        "tests/web1: differs from tests/Web1 only by case",
        "modules/dns.tf: is not the file but what git-lfs has committed in its place",
    ):
        assert f"toto: {words}" in said
    pusher.git("rm", "-rq", "--cached", "tests/web1", "cafe\u0301", "terraform", "modules")
    pusher.commit()
    said = refused(pusher)
    for words in (
        "secret: is not the file but what git-crypt has committed",
        "hosts/a.nix: is a link that leads out of the repo, to /etc/shadow",
        "helm/b: is a link that leads out of the repo, to ../../up",
        "deep/c: is a link that leads out of the repo, to ../../../x",
        "d: is a link that leads out of the repo, to /nix/store/x",
    ):
        assert f"toto: {words}" in said
    assert "result" not in said and "fine" not in said
    pusher.git("rm", "-rq", "--cached", "secret", "hosts/a.nix", "helm/b", "deep/c", "d")
    pusher.commit()
    pusher.push()


def test_a_link_to_what_is_not_in_the_commit_is_refused_by_name(pusher: Pusher) -> None:
    links = {
        "fine": "deep er/to",
        "through": "folder/../fine",
        "folder": "deep er/",
        "deep er/up": "../fine",
        "toto.toml": "ignored.toml",
        "round": "round",
        "annexed": ".git/annex/objects/x",
        "late": "folder/nothing",
        "docs/old": "gone",
    }
    for name, to in links.items():
        (pusher.folder / name).parent.mkdir(exist_ok=True)
        (pusher.folder / name).symlink_to(to)
    write(pusher, {"deep er/to": "x"})
    said = refused(pusher)
    for name in ("toto.toml", "round", "annexed", "late", "docs/old"):
        assert f"toto: {name}: is a link to {links[name]}, which is not in the repo" in said
    assert "fine" not in said and "through" not in said and "deep er/up" not in said
    pusher.git("rm", "-q", "toto.toml", "round", "annexed", "late")
    write(pusher, {"toto.toml": '[tree]\nunfinished = ["docs/old"]\n'})
    pusher.push()


def test_what_nothing_reads_may_be_unfinished_by_a_setting(pusher: Pusher) -> None:
    (pusher.folder / "docs/theme").mkdir(parents=True)
    pusher.git("update-index", "--add", "--cacheinfo", f"160000,{pusher.commit()},docs/theme")
    write(pusher, {"docs/logo.png": LFS, "docs2/logo.png": LFS, "toto.toml": '[tree]\nunfinished = ["docs/", "x/"]\n'})
    said = refused(pusher)
    assert "docs2/logo.png: is not the file" in said and "docs/" not in said
    write(pusher, {"toto.toml": '[tree]\nunfinished = ["docs", "docs2/logo.png"]\n'})
    pusher.push()
    pusher.git("push", str(pusher.remote), "HEAD:refs/heads/other")
    write(pusher, {"toto.toml": "[tree]\nunfinished = 3\n"})
    said = refused(pusher)
    assert "toto.toml:2: tree.unfinished" in said and "docs/theme: is a submodule" in said


def test_manifest_that_the_push_does_not_change_is_not_checked(pusher: Pusher) -> None:
    write(pusher, {"machines.yaml": "fleet: []\n"})
    pusher.push("main:refs/heads/elsewhere")  # which is not deployed
    assert "toto: machines.yaml:1: fleet: is not a known field" in refused(pusher)
    write(pusher, {"machines.yaml": GOOD})
    pusher.push()
    write(pusher, {"machines.yaml": None})
    assert "toto: machines.yaml: is gone" in refused(pusher)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "machines.yaml:1: is empty"),
        (b"machines:\n  a: \xff\n", "machines.yaml:2: is not UTF-8"),
        pytest.param(b"#" * (2 << 20), "machines.yaml:1: is larger than 1 MiB", id="huge"),
    ],
)
def test_strange_manifests_are_refused_as_by_the_run(pusher: Pusher, content: bytes, complaint: str) -> None:
    (pusher.folder / "machines.yaml").write_bytes(content)
    pusher.git("add", "--all")
    pusher.commit()
    assert f"toto: {complaint}" in refused(pusher)


def test_a_first_push_without_a_manifest_is_refused(pusher: Pusher) -> None:
    write(pusher, {"machines.yaml": None, "hosts/web1.nix": "{ }"})
    assert "toto: machines.yaml: is missing; list the machines in it, or `machines: []`" in refused(pusher)
    write(pusher, {"machines.yaml": "machines: []\n"})
    pusher.push()


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ("web7,web1", "only=web7: nothing in this commit is called so: did you mean web1?"),
        ("host/web7", "only=host/web7: nothing in this commit is called so"),
        ("xyzzy", "only=xyzzy: nothing in this commit is called so; machines and tags are all, web1"),
        ("web1,host/web1,host,helm,helm/shop,files,file,all,gold,laptop,desk,dns,host/toto.canon", ""),
    ],
)
def test_a_name_that_nothing_has_is_refused_with_the_one_that_was_meant(pusher: Pusher, only: str, said: str) -> None:
    write(
        pusher,
        {
            "machines.yaml": "machines:\n  - {name: web1, address: 10.0.0.1, tags: [all]}\n",
            "hosts/web1.nix": "{ }",
            "hosts/toto.canon.nix": "{ }",
            "helm/shop/release.yaml": "tags: [gold]\n",
            "files/x": "",
            "flake.nix": "{ nixosConfigurations.laptop = 1; }",
            "nixos/parts/all.nix": "{ desk = 1; }",
            "toto.toml": '[terraform.roots.dns]\npath = "x"\n',
        },
    )
    pusher.git("config", "push.pushOption", f"only={only}")
    if said:
        assert f"toto: {said}" in refused(pusher)
    else:
        pusher.push()


def test_manifest_that_is_a_link_or_a_folder(pusher: Pusher) -> None:
    (pusher.folder / "machines.yaml").unlink()
    (pusher.folder / "machines.yaml").symlink_to("fleet.yaml")
    write(pusher, {"fleet.yaml": GOOD})
    pusher.push()  # the run follows it
    (pusher.folder / "machines.yaml").unlink()
    write(pusher, {"machines.yaml/x": "y"})
    assert "machines.yaml: is gone" in refused(pusher)


async def test_deployed_branch_only_moves_forward(pusher: Pusher, repo: Path) -> None:
    first = pusher.git("rev-parse", "HEAD")
    pusher.commit()
    pusher.push()
    pusher.push("main:refs/heads/other")
    said = refused(pusher, f"+{first}:refs/heads/main")
    assert "a forced push to it is refused" in said and "toto repo set infra --allow-force" in said
    assert "it cannot be deleted" in refused(pusher, ":main")
    refused(pusher, ":main", "main:refs/heads/new")  # all or nothing
    pusher.push(f"+{first}:refs/heads/other")
    pusher.push(":other")
    await git_host.set_policy(repo, allow_force=True)
    pusher.push(f"+{first}:refs/heads/main")
    pusher.push(":main")
    assert pusher.git("ls-remote", str(repo)) == ""


@pytest.mark.parametrize("ref", ["refs/replace/" + "a" * 40, "refs/notes/commits", "refs/tags/toto/last-good"])
def test_only_branches_and_tags_of_the_users_own(pusher: Pusher, ref: str) -> None:
    assert ref in refused(pusher, f"main:{ref}")


@pytest.mark.parametrize(
    ("ref", "complaint"),
    [
        ("refs/heads/HEAD", "no branch and no tag can have this name here"),
        ("refs/tags/HEAD", "no branch and no tag can have this name here"),
        ("refs/tags/FETCH_HEAD", "no branch and no tag can have this name here"),
        ("refs/heads/refs/heads/main", "no branch and no tag can have this name here"),
        ("refs/heads/3f1c9b2a", "no branch and no tag can have this name here"),
        ("refs/tags/" + "a" * 40, "no branch and no tag can have this name here"),
        ("refs/heads/toto/last-good", "belongs to toto"),
        ("refs/tags/main", "refs/tags/main would have the same name as refs/heads/main"),
        ("refs/heads/v1", "refs/heads/v1 would have the same name as refs/tags/v1"),
    ],
)
def test_names_that_could_be_taken_for_something_else_are_refused(pusher: Pusher, ref: str, complaint: str) -> None:
    pusher.push()
    pusher.push("main:refs/tags/v1")
    assert complaint in refused(pusher, f"main:{ref}")


def test_a_branch_and_a_tag_of_one_name_cannot_come_together_and_one_can_replace_the_other(pusher: Pusher) -> None:
    pusher.push()
    assert "would have the same name" in refused(pusher, "main:refs/heads/x", "main:refs/tags/x")
    pusher.push("main:refs/tags/x")
    pusher.git("push", str(pusher.remote), ":refs/tags/x", "main:refs/heads/x")


async def test_who_may_only_rehearse_pushes_everything_but_what_is_deployed(
    pusher: Pusher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = await git_host.make_admin(tmp_path, "alice", key("a"))
    work = tmp_path / "rules"
    subprocess.run(["git", "clone", "--quiet", admin, work], check=True)
    rules = (work / access.FILE).read_text().replace("[users]", "[users]\nbob = []\ndora = []\neve = []")
    write(
        Pusher(work, admin),
        {access.FILE: rules + '[repos.infra]\nread = ["eve"]\nrehearse = ["bob"]\ndeploy = ["dora"]\n'},
    )
    subprocess.run(["git", "push", "--quiet", admin, "HEAD:main"], cwd=work, check=True)
    monkeypatch.setenv(access.USER_VARIABLE, "dora")
    pusher.push()
    pusher.push("main:refs/tags/v1")
    for user in ("bob", "eve", "stranger"):  # (the shell lets the other two not even begin)
        monkeypatch.setenv(access.USER_VARIABLE, user)
        pusher.commit()
        for refspecs in (["main"], ["main:refs/heads/x", "main"], [":main"], ["+main:refs/heads/main"]):
            said = refused(pusher, *refspecs)
            assert f"{user} may rehearse infra, but not deploy it: main is its deployed branch" in said
            assert "next: git push -o rehearse" in said
        for refspec in ("+main:refs/tags/v1", ":refs/tags/v1"):
            assert "v1 is a tag that is there already" in refused(pusher, refspec)
        assert "deny updating a hidden ref" in refused_by_git(pusher, "main:refs/toto/ledger")
    monkeypatch.setenv(access.USER_VARIABLE, "bob")
    pusher.push("main:refs/heads/feature")
    pusher.push("main:refs/tags/v2")
    pusher.push(":feature")
    monkeypatch.setenv(access.USER_VARIABLE, "dora")
    pusher.push("+main:refs/tags/v1")
    pusher.push()


def refused_by_git(pusher: Pusher, refspec: str) -> str:
    with pytest.raises(AssertionError) as failed:
        pusher.push(refspec)
    return str(failed.value)


async def test_large_file_is_named_even_when_a_later_commit_removed_it(pusher: Pusher, repo: Path) -> None:
    pusher.push()
    write(pusher, {"isö/an image.raw": "x" * 5000, "small": "y" * 4096})
    write(pusher, {"isö/an image.raw": None})
    await git_host.set_policy(repo, max_file_size=4096)
    said = refused(pusher)
    assert "is\\xf6/an image.raw is larger than 4096 bytes" in said and "small" not in said
    assert "image.raw" in refused(pusher, "main:refs/tags/v1")
    await git_host.set_policy(repo, max_file_size=0)
    pusher.push()
    await git_host.set_policy(repo, max_file_size=4096)
    pusher.commit()
    pusher.push()  # the file is not new in this push


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["dry-run"], "the push option 'dry-run' is not known"),
        (["wiat"], "the push option 'wiat' is not known: did you mean wait?"),
        (["onyl=web1"], "the push option 'onyl=web1' is not known: did you mean only?"),
        (["only="], "the push option 'only=' is not known"),
        (["only=web1;id"], "'only=web1;id' is not known"),
        (['only=web1","x":"'], "is not known"),
        (["only=a,,b"], "is not known"),
        (["wait=5"], "is not known"),
        (["pl\x1ban"], "'pl\\x1ban' is not known"),
        (["skip", "only=web1"], "no other option goes with it"),
        (["plan", "rehearse"], "do not go together"),
        (["accept=web1"], "accept=TARGET and reason=TEXT go together"),
        (["reason=so"], "accept=TARGET and reason=TEXT go together"),
        (["accept=web1", "reason=so", "reason=or so"], "with one reason"),
        (["accept=web1", "reason=so", "plan"], "not with plan or rehearse"),
        (["accept=web1", "reason=so", "rehearse"], "not with plan or rehearse"),
        (["accept=web1", "reason=so", "skip"], "no other option goes with it"),
        (['accept=web1","x":"', "reason=so"], "is not known"),
        (["accept=web1", 'reason="'], "should be one line"),
        (["accept=web1", "reason=\\"], "should be one line"),
        (["accept=web1", "reason= "], "should be one line"),
        (["accept=web1", "reason=a\x1b[31m"], "should be one line"),
        (["accept=web1", f"reason={'x' * 301}"], "should be one line"),
        (["accept=web1", "reason=\udcff"], "should be one line"),
        (["accept=web1,terraform/dns", "reason=it's new: größer, $(id) `id`", "wait"], ""),
        (["plan", "only=web1,tag:x", "only=web2", "wait"], ""),
        (["skip"], ""),
        ([], ""),
    ],
)
def test_options_that_are_not_known_are_refused_with_those_that_are(options: list[str], complaint: str) -> None:
    said = "\n".join(receive.wrong_options(options))
    assert complaint in said if complaint else said == ""
    if "not known" in complaint:
        assert all(f"-o {option}" in said for option in receive.OPTIONS)


@pytest.mark.parametrize(("text", "bytes_"), [("0", 0), ("100", 100), ("4k", 4096), ("20M", 20 << 20), ("1g", 1 << 30)])
def test_sizes(text: str, bytes_: int) -> None:
    assert receive.size(text) == bytes_


@pytest.mark.parametrize("text", ["", "-1", "1.5m", "many", "1t", "9" * 30])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a file size"):
        receive.size(text)


def test_policy_is_read_as_git_writes_it() -> None:
    config = "toto.signed\0toto.allowforce\nno\0toto.branch\nlive\0toto.maxfilesize\n2k\0toto.apiurl\nx\ny\0"
    assert Policy.of(config) == Policy(branch="live", signed=True, max_file_size=2048)


# Signatures


def sign(pusher: Pusher, signing: Path, name: str, *more: str) -> None:
    pusher.git(
        "-c",
        "gpg.format=ssh",
        "-c",
        f"user.signingKey={signing / name}",
        "commit",
        "--quiet",
        "--allow-empty",
        "-S",
        "-m",
        f"signed by {name}",
        *more,
    )


async def test_unsigned_and_untrusted_commits_are_refused_where_signatures_are_wanted(
    pusher: Pusher, repo: Path, signing: Path
) -> None:
    pusher.push()  # the history before that may be unsigned
    signers = signing / "signers"
    signers.write_text(f'op@example.org namespaces="git" {(signing / "good.pub").read_text()}')
    await git_host.set_policy(repo, signed=True, allowed_signers=str(signers))
    begin = pusher.git("rev-parse", "HEAD")
    sign(pusher, signing, "good")
    pusher.push()
    unsigned = pusher.commit()
    sign(pusher, signing, "good")  # signing what follows does not help
    assert f"toto: {unsigned[:8]} is not signed" in refused(pusher)
    pusher.git("reset", "--quiet", "--hard", "HEAD~2")
    sign(pusher, signing, "bad")
    said = refused(pusher)
    assert "is signed with a key that is not trusted here: SHA256:" in said
    assert "is signed with a key" in refused(pusher, "main:refs/heads/feature"), "whose rehearsal runs its tests here"
    pusher.git("reset", "--quiet", "--hard", "HEAD~1")
    sign(pusher, signing, "good")
    genuine = pusher.git("cat-file", "commit", "HEAD").replace("signed by good", "signed by evil")
    forged = subprocess.run(
        ["git", "hash-object", "-t", "commit", "-w", "--stdin"],
        input=genuine + "\n",
        text=True,
        cwd=pusher.folder,
        capture_output=True,
        check=True,
    ).stdout.strip()
    assert "was changed after it was signed" in refused(pusher, f"{forged}:main")
    pusher.push()
    pusher.push(f"{begin}:refs/heads/old")  # the commits of the deployed branch are not checked again
    signers.unlink()
    sign(pusher, signing, "good")
    assert "cannot be read on toto" in refused(pusher)


async def test_gpg_signatures_count_when_their_key_is_in_totos_keyring_and_trusted(
    pusher: Pusher, repo: Path, signing: Path
) -> None:
    bob, toto = signing / "bob", signing / "toto"
    for home in (bob, toto):
        home.mkdir(mode=0o700)
    subprocess.run(
        [
            "gpg",
            "--homedir",
            bob,
            "--batch",
            "--quiet",
            "--passphrase",
            "",
            "--quick-generate-key",
            "bob@example.org",
            "ed25519",
            "sign",
        ],
        check=True,
        capture_output=True,
    )
    public = subprocess.run(["gpg", "--homedir", bob, "--export"], check=True, capture_output=True).stdout
    program = signing / "gpg"
    program.write_text(f'#!/bin/sh\nexec gpg --homedir {bob} "$@"\n')
    program.chmod(0o755)
    pusher.push()
    await git_host.set_policy(repo, signed=True, allowed_signers=os.devnull)
    pusher.git("-c", f"gpg.program={program}", "commit", "--quiet", "--allow-empty", "-Sbob@example.org", "-m", "x")
    assert "is signed with a key that is not known here" in refused(pusher)  # no keyring at all
    await git_host.set_policy(repo, gpg_home=str(toto))
    assert "is signed with a key that is not known here" in refused(pusher)
    subprocess.run(
        ["gpg", "--homedir", toto, "--batch", "--quiet", "--import"], input=public, check=True, capture_output=True
    )
    assert "is signed with a key that is not trusted here" in refused(pusher)
    (toto / "gpg.conf").write_text("trust-model always\n")
    pusher.push()


async def test_deployers_keys_are_trusted_where_no_signers_are_named(tmp_path: Path, signing: Path) -> None:
    """The hook reads the rules from their own repository, while it is in the quarantine of a different one."""
    await git_host.make_admin(tmp_path / "repos", "alice", (signing / "good.pub").read_text())
    repo = await git_host.make(tmp_path / "repos", "infra")
    pusher = Pusher(tmp_path / "clone", repo)
    pusher.git("config", "push.pushOption", "skip")
    pusher.push()
    await git_host.set_policy(repo, signed=True)
    sign(pusher, signing, "bad")
    assert "is not trusted here" in refused(pusher)
    pusher.git("reset", "--quiet", "--hard", "HEAD~1")
    sign(pusher, signing, "good")
    pusher.push()


async def test_push_of_many_branches_at_once(pusher: Pusher, repo: Path, signing: Path) -> None:
    pusher.push()
    await git_host.set_policy(repo, signed=True, allowed_signers=os.devnull)
    for number in range(60):
        pusher.git("branch", f"b{number}")
    pusher.git("push", "--quiet", str(pusher.remote), "refs/heads/b*:refs/heads/b*")
    assert len(pusher.git("ls-remote", "--heads", str(pusher.remote)).splitlines()) == 61


# The rules' own repository


def test_accepting_goes_with_a_push_of_the_deployed_branch(pusher: Pusher) -> None:
    pusher.git("config", "--unset", "push.pushOption")
    options = ("-o", "accept=web1", "-o", "reason=so")
    with pytest.raises(AssertionError, match="accept goes with a push of the deployed branch, main"):
        pusher.git("push", *options, str(pusher.remote), "main:refs/heads/other", "main:refs/tags/v1")
    assert "nothing is deployed yet" in pusher.git("push", *options, str(pusher.remote), "main")


async def test_broken_rules_are_refused_with_their_line_and_the_old_ones_stay(tmp_path: Path, signing: Path) -> None:
    admin = await git_host.make_admin(tmp_path / "repos", "alice", (signing / "good.pub").read_text())
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", admin, clone], check=True)
    pusher = Pusher(clone, admin)
    good = (clone / access.FILE).read_text()
    write(pusher, {access.FILE: good.replace('admin = ["alice"]', 'admin = ["alcie"]')})
    assert "toto: access.toml:7: toto-admin: admin: there is no user 'alcie' in [users]" in refused(pusher)
    write(pusher, {access.FILE: None})
    assert "access.toml: is gone" in refused(pusher)
    assert set((await access.in_force(tmp_path / "repos")).users) == {"alice"}
    write(pusher, {access.FILE: good.replace("[users]", "[users]\nbob = []")})
    assert (
        "takes no option"
        in subprocess.run(
            ["git", "push", "-o", "plan", admin, "main"], cwd=clone, capture_output=True, text=True, check=False
        ).stderr
    )
    assert "these rules are in force from now on" in pusher.push()
    assert set((await access.in_force(tmp_path / "repos")).users) == {"alice", "bob"}
    assert "in force" not in pusher.push("main:refs/heads/draft")
    assert "it cannot be deleted" in refused(pusher, ":main")


# The hook's surroundings


async def test_environment_of_a_hook_does_not_leak_into_totos_own_git(
    tmp_path: Path, repo: Path, pusher: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that toto does to repositories, inside the pre-receive hook of a different repository."""
    pusher.push()
    commit = pusher.git("rev-parse", "HEAD")
    other = tmp_path / "other.git"
    await process.run(["git", "init", "--quiet", "--bare", other])
    before = sorted(path for path in other.rglob("*"))
    for name, value in {
        "GIT_DIR": str(other),
        "GIT_QUARANTINE_PATH": str(other / "objects" / "incoming"),
        "GIT_OBJECT_DIRECTORY": str(other / "objects" / "incoming"),
        "GIT_INDEX_FILE": "/nowhere",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(other / "objects"),
        "GIT_WORK_TREE": "/nowhere",
        "GIT_CONFIG_PARAMETERS": "'core.bare'='false'",
        "GIT_PUSH_OPTION_COUNT": "1",
        "GIT_PUSH_OPTION_0": "plan",
    }.items():
        monkeypatch.setenv(name, value)
    await git.mark(repo, "toto/last-good", commit)
    await git.checkout(repo, commit, tmp_path / "tree")
    repos = tmp_path / "repos"
    await git_host.make_admin(repos, "alice", key("a"))
    made = await git_host.make(repos, "fresh")
    assert await git_host.deployed_branch(made) == "main"
    assert set((await access.in_force(repos)).users) == {"alice"}
    toto = [sys.executable, "-m", "toto.cli"]
    done = await process.run([*toto, "repo", "set", "fresh", "--signed", "--repos", repos])
    assert "signed" in done.stdout and (await git_host.policy_of(made)).signed
    assert "nothing was deployed" in (await process.run([*toto, "status", "--repo", repo])).stdout
    assert sorted(path for path in other.rglob("*")) == before


def test_hook_says_what_to_do_when_its_python_is_gone(pusher: Pusher, repo: Path) -> None:
    pusher.git("config", "--file", str(repo / "config"), "toto.python", "/nowhere/python")
    done = subprocess.run(["git", "push", repo, "main"], cwd=pusher.folder, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "does not know where toto is; start toto" in done.stderr


def test_hook_needs_no_pydantic_unless_the_manifest_changes() -> None:
    code = "import sys, toto.git_host.receive; print({'pydantic', 'yaml', 'git', 'prefect'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
