"""The first step in a new infra repo: a manifest of the hosts that are there."""

import uuid
from pathlib import Path

from toto.base import runs
from toto.base.errors import InputError
from toto.cli.verbs import Verbs
from toto.infra_repo import git, manifest, settings, working
from toto.nix import commands as nix
from toto.nix import hosts
from toto.nix.hosts import Host

verbs = Verbs()

_HEAD = """\
# The machines of the fleet, and what toto may do with each: docs/manifest.md. Nothing is deployed to a machine with
# `deploy: none`; its host is rehearsed all the same. Set its address, let toto's key in (docs/machines.md), then take
# the line out.
machines:
"""


@verbs.verb("init")
async def init() -> int:
    """Write machines.yaml, in this folder, from the hosts that are found in it.

    A host is NAME.nix, or a folder NAME with a default.nix, in hosts/ or machines/; or one of the nixosConfigurations
    of flake.nix. Each gets its name as its address, and is not deployed until you say so.
    """
    file = Path.cwd() / manifest.FILE
    if file.exists():
        raise InputError("is there already", target=file.name, hint="`toto plan` tells which hosts it does not list")
    repo, commit = await working.commit(Path.cwd())
    async with runs.claimed(repo, f"init-{uuid.uuid4()}") as scratch:
        await git.checkout(repo, commit, scratch / "tree")
        names = sorted(each.name for each in await _hosts(scratch / "tree") if hosts.is_name(each.name))
    if not names:
        raise InputError("there are no hosts here", hint="hosts/NAME.nix, or nixosConfigurations of a flake.nix")
    text = _HEAD + "".join(f"  - name: {name}\n    address: {name}\n    deploy: none\n" for name in names)
    manifest.parse(text)
    with file.open("x") as new:
        new.write(text)
    print(f"{file.name} lists {', '.join(names)}")
    return 0


async def _hosts(tree: Path) -> list[Host]:
    """The hosts of a flake that has some, else those that are files."""
    rules, found = settings.load(tree).nix, None
    if rules.flake is not False and (tree / str(rules.flake) / hosts.FLAKE).is_file():
        found = await nix.flake_hosts(tree, str(rules.flake), timeout=rules.evaluate_timeout)
    return list(hosts.named(tree)) if found is None else found
