"""Notify: send the result of a run to who started it, and to every venue that it is news to.

An error here never fails a run and never hides a failure: a venue that cannot be notified is a warning in the log.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_UI_URL

from blocks import venues
from toto.base.errors import TotoError
from toto.infra_repo import git, tree
from toto.infra_repo.manifest import Manifest
from toto.infra_repo.settings import Settings
from toto.plan.make import LAST_GOOD
from toto.report import notified
from toto.report.message import Message
from toto.report.notified import Check, Notified
from toto.report.report import Report
from toto.report.venues import Audience, Origin, venues_for


@task(name="notify", task_run_name="notify", cache_policy=NO_CACHE)
async def notify(
    repo: Path,
    commit: str,
    end: Report | Exception,
    origin: Origin,
    named: Sequence[str] = (),
    of: tuple[Settings, Manifest] | None = None,
    listening: bool = True,
    check: Check = "reconcile",
    run: str | None = None,
) -> None:
    """Notify people of the end of a run. Raises nothing.

    `end` is the run's report, or the error that broke it off before it had one. `named` are venues that the run's
    starter asked for. `of` are settings and manifest; when the run broke off before it read them, leave them out: then
    those of the commit, or else of the last good commit, are used. With `listening` False only the venues that asked
    are notified; that is for runs that deploy nothing. `check` is the kind of run: what one kind finds good says
    nothing about what the other found wrong. `run` is the id of the run that ended, when that is not this run.
    """
    try:
        settings, manifest = of or await _readable(repo, commit)
        about = await git.describe(repo, commit)
        link = f"{PREFECT_UI_URL.value()}/runs/flow-run/{run or runtime.flow_run.id}"
        message = (
            Message.of(end, about, link)
            if isinstance(end, Report)
            else Message.broken_off(repo.name.removesuffix(".git"), end, about, link)
        )
        audience = venues_for(
            origin,
            about.committer,
            {name: machine.venues for name, machine in manifest.machines.items()},
            settings.venues.fleet,
            named,
            settings.venues.mail_pusher,
        )
        known = await notified.read(repo, check) if listening else {}
        heard = await _send_all(repo, message, audience if listening else replace(audience, listening={}), known)
        if listening and heard:
            await notified.remember(repo, heard, check)
        if settings.venues.notes and check == "reconcile":
            await notified.note(repo, commit, message)
    except Exception as error:
        get_run_logger().warning("nobody could be notified of the result: %s", _words(error))


async def _send_all(repo: Path, message: Message, audience: Audience, known: Notified) -> Notified:
    """Send to all venues at once. Returns what the venues that got their message know now."""
    messages = {name: notified.news(message, known.get(name, {})) or message for name in audience.asked}
    for name, targets in audience.listening.items():
        concern = message if targets is None else message.about(targets)
        if news := notified.news(concern, known.get(name, {})):
            messages[name] = news
    mail = [_attempt(audience.mail, _mail(repo, audience.mail, message))] if audience.mail else []
    done = await asyncio.gather(*(_attempt(name, _send(repo, name, each)) for name, each in messages.items()), *mail)
    return {
        name: notified.after(each, known.get(name, {}))
        for (name, each), heard in zip(messages.items(), done, strict=False)
        if heard
    }


async def _send(repo: Path, name: str, message: Message) -> None:
    await asyncio.gather(*(venue.send(message) for venue in await venues.named(name, repo)))


async def _mail(repo: Path, address: str, message: Message) -> None:
    await (await venues.pusher(address, repo)).send(message)


async def _attempt(who: str, sending: Awaitable[None]) -> bool:
    """Send, log the result, and return whether `who` got it."""
    try:
        await sending
    except Exception as error:
        get_run_logger().warning("%s was not notified: %s", who, _words(error))
        return False
    get_run_logger().info("%s was notified", who)
    return True


def _words(error: Exception) -> str:
    """An error as text for the log. An error that is not toto's own may contain a secret, so only its type is shown."""
    return str(error) if isinstance(error, TotoError) else f"unexpected {type(error).__name__}"


async def _readable(repo: Path, commit: str) -> tuple[Settings, Manifest]:
    """Settings and manifest of the commit, else of the last good commit; defaults when neither can be read."""
    for each in (commit, f"refs/tags/{LAST_GOOD}"):
        try:
            with tempfile.TemporaryDirectory() as directory:
                await git.checkout(repo, each, Path(directory, "tree"))
                return tree.read_tree(Path(directory, "tree"))
        except TotoError:
            continue
    return Settings(), Manifest()
