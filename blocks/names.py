"""Which blocks an infra repo may use: those that are called after it. A server with one repo needs no such names."""

from pathlib import Path

from toto.base import server_rules
from toto.git_host import host, shared


def names(repo: Path, target: str | None = None) -> list[str]:
    """The names of the blocks of an infra repo, or of one of its targets, the most special first.

    They are `REPO--TARGET` and `REPO`, which no other repo has among its names, and for the repo that may use the
    shared blocks also `TARGET` and `toto`. Raises `InputError` when the server's rules are wrong, and when the name is
    that of a repo that was there before.
    """
    own = _own(repo)
    return [
        *([f"{own}--{shared.block_name(target)}"] if target else []),
        own,
        *_shared(repo, *([target] if target else []), "toto"),
    ]


def own_or_shared(repo: Path, name: str) -> list[str]:
    """The names of the blocks that an infra repo means by `name`: `REPO--NAME`, and `NAME` if it may use shared ones.

    Raises what `names` raises.
    """
    return [f"{_own(repo)}--{shared.block_name(name)}", *_shared(repo, name)]


def _own(repo: Path) -> str:
    own = shared.block_name(shared.name_of(repo))
    shared.claim(repo, own)
    return own


def used(repo: Path, name: str) -> None:
    """Note that an infra repo has used a block, by one of its names: no repo that comes later gets it."""
    if "--" not in name:
        shared.claim(repo, name, take=True)


def _shared(repo: Path, *wanted: str) -> list[str]:
    """Those of the shared names that an infra repo may use: never one that is, or was, a different repo's own.

    The repo that `shared_blocks` names also has those that a different one has used before.
    """
    if not shared.has_shared_blocks(repo):
        return []
    others = {
        shared.block_name(shared.name_of(each)) for each in host.infra_repos(repo.parent) if each.name != repo.name
    }
    named = server_rules.load().shared_blocks is not None
    return [
        name
        for name in dict.fromkeys(map(shared.plain, wanted))
        if name not in others and (named or shared.is_free(repo, name))
    ]
