"""What is deployed, and its history."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlencode

from typer import Argument, Option

from toto.cli.common import Repo, Repos, api_near, infra, infra_or_none
from toto.cli.output import AsJson, document, emit, lines_of, say
from toto.cli.remote import Remote
from toto.cli.verbs import Verbs
from toto.fleet.state import Fleet
from toto.fleet.words import ago, lasted
from toto.git_host.host import infra_repos
from toto.ledger import history
from toto.ledger.target import Target

verbs = Verbs()

NOTHING: Final = "nothing was deployed from here yet"
_STATUS: Final = ("target", "state", "commit", "age", "system", "last run", "notes")
_LOG: Final = ("when", "target", "what", "commit", "author", "took", "why")
_LOOK: Final = 2.0  # seconds between two looks of --watch
_CLEAR: Final = "\x1b[H\x1b[J"
_TOLD: Final = ("failed", "COULD NOT", "held back", "waiting")  # results whose reason is shown


@verbs.verb("status")
async def status(
    repos: Repos,
    repo: Repo = None,
    watch: Annotated[bool, Option("--watch", help="show it anew as it changes, until Ctrl-C")] = False,
    as_json: AsJson = False,
) -> int:
    """Show every target, one a line: what it runs, its last run, and what a person should know of it.

    What needs a person comes first. A machine's last contact and the whole paths of systems are in the JSON, of which
    --watch prints a document for each change.
    """
    async with aclosing(_states(repo, repos)) as states:
        async for state in states:
            _print(state, as_json=as_json, anew=watch and not as_json and sys.stdout.isatty())
            if not watch:
                break
    return 0


def _print(state: Mapping[str, Any], *, as_json: bool, anew: bool) -> None:
    for each in state["errors"]:
        say(each)
    targets = state["targets"]
    if as_json:
        print(document("targets", targets), flush=True)
        return
    several = len({each["repo"] for each in targets}) > 1
    columns = (*(["repo"] if several else []), *_STATUS)
    moods = [each["mood"] for each in targets]
    text = "\n".join(lines_of([_row(each) for each in targets], columns, moods)) if targets else NOTHING
    print((_CLEAR if anew else "") + text, flush=True)


def _row(each: Mapping[str, Any]) -> dict[str, str]:
    last = each["last"]
    told = last["why"] if any(word in last["result"] for word in _TOLD) else ""
    desired = f"→{each['desired']['hash'][:8]}" if each["desired"] else ""
    return {
        "repo": each["repo"],
        "target": Target.of(each["target"]).label,
        "state": each["state"],
        "commit": (each["commit"]["hash"][:8] if each["commit"] else "") + desired,
        "age": ago(each["since"], datetime.now(UTC)).removesuffix(" ago"),
        "system": each["system"].removeprefix("/nix/store/")[:7],
        "last run": last["result"],
        "notes": "; ".join(filter(None, [each["why"].partition("\n")[0], told, *each["notes"]])),
    }


async def _states(repo: Path | None, repos: Path) -> AsyncGenerator[Mapping[str, Any], None]:
    """The fleet as it is, and again after each change: as the JSON of the fleet's page has it."""
    if (remote := Remote.named()) is not None:
        seen = None
        while True:
            if (found := await remote.page()) != seen:
                seen = found
                yield {
                    **found,
                    "targets": [each for each in found["targets"] if repo is None or str(repo) == each["repo"]],
                }
            await asyncio.sleep(_LOOK)
    only = infra_or_none(repo, repos) or (None if infra_repos(repos) else infra(repo, repos))
    fleet = Fleet(repos, await api_near(only, repos), only)
    stamp = None
    while True:
        state = await fleet.now()
        if state.stamp != stamp:
            stamp = state.stamp
            yield {"targets": [each.json() for each in state.lines], "errors": state.errors}
        await asyncio.sleep(_LOOK)


@verbs.verb("log")
async def log(
    target: Annotated[str | None, Argument(metavar="TARGET", help="such as web1, terraform/dns (default: all)")] = None,
    repo: Repo = None,
    lines: Annotated[int, Option("-n", metavar="N", min=1, help="how many, the newest")] = 30,
    since: Annotated[
        str, Option(metavar="TIME", help="none that is older: `2 weeks ago`, `2026-01-31`", show_default=False)
    ] = "",
    author: Annotated[
        str, Option(metavar="NAME", help="only commits of authors with this in their names", show_default=False)
    ] = "",
    as_json: AsJson = False,
) -> int:
    """Show the deployment history, newest first."""
    wanted = None if target is None else Target.of(target)
    if (remote := Remote.named()) is not None:
        asked = urlencode(
            {"repo": str(repo or ""), "target": str(wanted or ""), "since": since, "author": author, "most": lines}
        )
        found = await remote.page("/log", asked)
    else:
        found = history.chosen(infra(repo), wanted, since=since, author=author, most=lines)
    rows = [
        {
            "when": each["at"][:16].replace("T", " "),
            "target": Target.of(each["target"]).label,
            "what": each["what"],
            "commit": each["commit"][:8],
            "author": each["author"],
            "took": lasted(each["seconds"]),
            "why": each["why"],
        }
        for each in found
    ]
    none = "the history has nothing of that" if target or since or author else NOTHING
    emit("events", found, lines_of(rows, _LOG) if rows else none, as_json=as_json)
    return 0
