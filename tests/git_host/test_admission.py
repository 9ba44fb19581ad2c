"""What a run may deploy: its commit is looked at again, wherever the run came from."""

import subprocess
from pathlib import Path

import pytest

from tests.git_host.test_host import Pusher
from tests.git_host.test_receive import sign
from tests.repos import InfraRepo
from toto.git_host import admission
from toto.git_host import host as git_host
from toto.git_host.admission import NotDeployable


async def test_only_commits_of_the_deployed_branch_may_be_deployed(pusher: Pusher, repo: Path) -> None:
    first = pusher.git("rev-parse", "HEAD")
    tip = pusher.commit()
    pusher.push()
    for commit in (first, tip):
        await admission.check(repo, commit)
    other = pusher.commit()
    pusher.push("main:refs/heads/feature")
    pusher.push("main:refs/tags/v7")
    for commit in (other, "f" * 40):
        with pytest.raises(NotDeployable, match="is not on main, the deployed branch") as refused:
            await admission.check(repo, commit)
        assert "next: push it to main" in str(refused.value)
    await git_host.set_policy(repo, branch="live")
    with pytest.raises(NotDeployable, match="not on live"):
        await admission.check(repo, tip)


async def test_a_repository_without_totos_settings_deploys_the_branch_of_its_head(tmp_path: Path) -> None:
    plain = InfraRepo(tmp_path / "plain")
    with pytest.raises(NotDeployable, match="not on main"):
        await admission.check(plain.bare, "f" * 40)
    await admission.check(plain.bare, plain.commit({"a": "1"}))


async def test_where_signatures_are_wanted_an_unsigned_commit_is_not_deployed_whatever_names_it(
    pusher: Pusher, repo: Path, signing: Path
) -> None:
    signers = signing / "signers"
    signers.write_text(f'op@example.org namespaces="git" {(signing / "good.pub").read_text()}')
    old = pusher.git("rev-parse", "HEAD")
    pusher.push()
    pusher.push("main:refs/tags/v7")
    await admission.check(repo, old)
    await git_host.set_policy(repo, signed=True, allowed_signers=str(signers))
    with pytest.raises(NotDeployable, match=f"{old[:8]} is not signed, and this repository"):
        await admission.check(repo, old)
    sign(pusher, signing, "good")
    pusher.push()
    await admission.check(repo, pusher.git("rev-parse", "HEAD"))
    sign(pusher, signing, "bad")
    await git_host.set_policy(repo, signed=False)
    pusher.push()
    await git_host.set_policy(repo, signed=True)
    with pytest.raises(NotDeployable, match="signed with a key that is not trusted"):
        await admission.check(repo, pusher.git("rev-parse", "HEAD"))


async def test_a_rehearsers_signature_counts_on_other_branches_only(tmp_path: Path, signing: Path) -> None:
    admin = await git_host.make_admin(tmp_path / "repos", "alice", (signing / "good.pub").read_text())
    work = tmp_path / "rules"
    subprocess.run(["git", "clone", "--quiet", admin, work], check=True)
    rules = Pusher(work, admin)
    bad = (signing / "bad.pub").read_text().strip()
    text = (work / "access.toml").read_text().replace("[users]", f'[users]\nbob = ["{bad}"]')
    (work / "access.toml").write_text(text + '[repos.infra]\nrehearse = ["bob"]\nadmin = ["alice"]\n')
    rules.git("add", "--all")
    rules.commit()
    rules.push("HEAD:main")
    infra = await git_host.make(tmp_path / "repos", "infra")
    pusher = Pusher(tmp_path / "clone", infra)
    pusher.git("config", "push.pushOption", "skip")
    pusher.push()
    await git_host.set_policy(infra, signed=True)
    sign(pusher, signing, "bad")
    pusher.push("main:refs/heads/feature")
    with pytest.raises(AssertionError, match="is signed with a key that is not trusted here"):
        pusher.push()
    with pytest.raises(NotDeployable):
        await admission.check(infra, pusher.git("rev-parse", "HEAD"))
