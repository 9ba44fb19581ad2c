"""Which commits a run may deploy: those of the deployed branch, signed where the repository wants signatures.

The hook has checked a push. A run is checked again, because it may come from anywhere (the UI, the API, a schedule, a
notebook) and may name any commit.
"""

from collections.abc import Mapping
from pathlib import Path

from toto.base import process
from toto.base.errors import TotoError
from toto.base.process import Completed
from toto.base.without_git import without_git
from toto.git_host import access, host, signatures
from toto.git_host.receive import Policy


class NotDeployable(TotoError):
    """The commit may be planned and rehearsed, and nothing else."""


async def check(repo: Path, commit: str) -> None:
    """Raise `NotDeployable` unless `commit` (a full hash) may be deployed from `repo` now."""
    policy = await host.policy_of(repo)
    branch = await _deployed(repo, policy)
    name = branch.removeprefix("refs/heads/")
    if not await _is_on(repo, commit, branch):
        raise NotDeployable(
            f"{commit[:8]} is not on {name}, the deployed branch: it may be planned and rehearsed, and nothing else",
            target=repo.name.removesuffix(".git"),
            hint=f"push it to {name}, or start the run with rehearse_only or plan_only",
        )
    if not policy.signed:
        return

    async def git(*arguments: str, extra: Mapping[str, str], timeout: float) -> Completed:
        return await process.run(
            ["git", f"--git-dir={repo}", *arguments], env=without_git() | dict(extra), timeout=timeout
        )

    wrong = await signatures.untrusted(
        git, repo, "deploy", "--no-walk", commit, allowed_signers=policy.allowed_signers, gpg_home=policy.gpg_home
    )
    if wrong:
        raise NotDeployable(
            f"{wrong[0]}, and this repository deploys nothing without a trusted signature",
            target=repo.name.removesuffix(".git"),
            hint=f"push a commit to {name} that is signed by someone who may deploy",
        )


async def on_deployed_branch(repo: Path, commit: str) -> bool:
    """Whether a commit is the tip of the deployed branch, or one before it."""
    return await _is_on(repo, commit, await _deployed(repo, await host.policy_of(repo)))


async def _deployed(repo: Path, policy: Policy) -> str:
    """The deployed branch, as a ref; of a repository that toto did not make it is the one that HEAD names."""
    if policy.branch:
        return f"refs/heads/{policy.branch}"
    return (await access.git(repo, "symbolic-ref", "HEAD", check=False)).stdout.strip() or "HEAD"


async def _is_on(repo: Path, commit: str, branch: str) -> bool:
    return (await access.git(repo, "merge-base", "--is-ancestor", commit, branch, check=False)).status == 0
