"""The public halves of keys."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from toto.base.errors import InputError
from toto.cli.common import Repos, on_toto
from toto.cli.verbs import Verbs
from toto.infra_repo.fields import check_key_name
from toto.machine import keys
from toto.nix import builders, daemon

verbs = Verbs()


@verbs.verb("key")
async def key(
    repo: Annotated[str, Argument(metavar="REPO", help="or `builders`, for the key that logs in to remote builders")],
    repos: Repos,
    name: Annotated[str | None, Argument(metavar="NAME", help="which key (default: the one for its machines)")] = None,
    new: Annotated[keys.Use | None, Option(help="first make the key, when it is missing")] = None,
    file: Annotated[Path | None, Option("--import", metavar="FILE", help="first take over this private key")] = None,
) -> int:
    """Print the public half of a key of a repository's."""
    if (repo, name) == (builders.KEY, None):  # (a repository of that name: `toto key builders machines`)
        print((daemon.socket().parent / builders.PUBLIC).read_text().strip())
        return 0
    path = on_toto(repos, repo)
    try:
        chosen = check_key_name(name or keys.MACHINES)
    except ValueError as error:
        raise InputError(str(error), target=name) from None
    if file is not None:
        await keys.import_key(path, chosen, file)
    if new is not None or chosen == keys.MACHINES:
        await keys.make(path, chosen, new or "ssh")
    found = keys.named(path, chosen, None, "toto key: the command line")
    print(await keys.public_half(found, f"toto {repo}"))
    return 0
