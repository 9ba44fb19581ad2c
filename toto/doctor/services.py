"""What runs, and whether it answers: the nix daemon and its builders, Prefect's server and worker, the database."""

import asyncio
import contextlib
import json
import os
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
from cryptography import x509

from toto.api import certificate, run
from toto.base import process
from toto.base.errors import TotoError
from toto.base.prefect_api import Api, ServerError, saved_auth
from toto.base.server_rules import Builder
from toto.doctor.findings import Finding, Toto
from toto.machine import signer
from toto.nix import builders, daemon, trial
from toto.server import database
from toto.server.deployments import POOL
from toto.server.environment import PROFILES

_START: Final = "start `toto serve`, or look at its log: journalctl -u toto"
_SOON: Final = 21  # days until a certificate ends
_SECONDS: Final = 10.0  # for an answer


async def nix_daemon(toto: Toto) -> Sequence[Finding]:
    """Whether toto's nix daemon builds. Raises `DaemonFailed` when there is none."""
    socket = daemon.socket()
    await trial.build(timeout=50)
    return [Finding("nix daemon", "ok", f"builds ({socket})")]


async def remote_builders(toto: Toto) -> Sequence[Finding]:
    """Whether each builder answers, with its own host key; for root also, whether it builds what it is there for."""
    try:
        home = daemon.socket().parent.parent
    except daemon.DaemonFailed:
        return []  # (that is a finding of its own)
    look = _builds if os.geteuid() == 0 else _answers
    return await asyncio.gather(*(look(name, each) for name, each in builders.listed(home).items()))


async def _builds(name: str, builder: Builder) -> Finding:
    said = f"builds for {', '.join(builder.systems)}"
    for system in builder.systems:
        try:
            await trial.build(system, builder=name, timeout=50)
        except TotoError as error:
            return Finding(f"builder {name}", "warning", f"does not build for {system}: {error.message}", _MEND_BUILDER)
    return Finding(f"builder {name}", "ok", said)


async def _answers(name: str, builder: Builder) -> Finding:
    words = ["ssh-keyscan", "-T", "5", "-p", str(builder.port), "--", builder.address]
    done = await process.run(words, timeout=40, check=False)
    keys = {line.partition(" ")[2] for line in done.lines if not line.startswith("#")}
    if not keys:
        said = f"does not answer at {builder.address}, port {builder.port}"
    elif " ".join(builder.host_key.split()[:2]) not in keys:
        said = f"a machine answers at {builder.address} that does not have its host key"
    else:
        return Finding(f"builder {name}", "ok", "answers; whether it builds, root sees: `toto doctor` as root")
    return Finding(f"builder {name}", "warning", said, _MEND_BUILDER)


_MEND_BUILDER: Final = "docs/builders.md; or take it out of the settings, until it is back"


async def prefect(toto: Toto) -> Sequence[Finding]:
    """Whether Prefect's server answers, by its password, and a worker is there. Raises `ServerError`."""
    if (served := _served(toto)) is None:
        return [Finding("Prefect's server", "missing", f"none has run with {toto.home}", _START)]
    api = Api(served["api_url"], saved_auth(toto.home / PROFILES))
    try:
        workers = await api.call("POST", f"/work_pools/{POOL}/workers/filter", {}, timeout=_SECONDS)
    except ServerError as error:
        if error.status != 404:
            return [Finding("Prefect's server", "missing", f"{api.url}: {error.message}", _START)]
        workers = []  # (no worker has made the pool yet)
    found = [Finding("Prefect's server", "ok", f"answers at {api.url}")]
    if any(each.get("status") == "ONLINE" for each in workers):
        return [*found, Finding("worker", "ok", "there")]
    return [*found, Finding("worker", "missing", "none: no run begins", _START)]


def _served(toto: Toto) -> dict[str, Any] | None:
    """How hooks find the server that ran here last."""
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((toto.repos / "server.json").read_text())
        return found
    return None


async def postgresql(toto: Toto) -> Sequence[Finding]:
    """Whether the database answers, when it is PostgreSQL. Raises `DatabaseError` when its programs are not there."""
    if url := os.environ.get("TOTO_DATABASE_URL"):
        place, connecting = "TOTO_DATABASE_URL", asyncpg.connect(url.replace("+asyncpg", "", 1), timeout=_SECONDS)
    elif database.versions(toto.home) and (cluster := await database.choose(toto.home)):
        place, connecting = f"PostgreSQL {cluster.programs.major}", cluster.connect()
    else:
        return [Finding("database", "ok", "SQLite, for trying out; `toto database move` moves it to PostgreSQL")]
    try:
        connection = await connecting
        await connection.close(timeout=_SECONDS)
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        return [Finding("database", "missing", f"{place} does not answer: {error or 'no answer'}", _START)]
    return [Finding("database", "ok", f"{place} answers")]


async def signs(toto: Toto) -> Sequence[Finding]:
    """Whether the signer answers, without which no document for a machine is made."""
    if await signer.answers():
        return [Finding("signer", "ok", "answers")]
    return [Finding("signer", "missing", "does not answer: machines that obey documents are told nothing", _START)]


async def certificates(toto: Toto) -> Sequence[Finding]:
    """The servers that have TLS, and how long their certificates are valid."""
    found = []
    if (listens := run.listens()) is not None:
        found.append(await _tls("machines' server", *listens, ca=certificate.authority(), mend=_START))
    ui = urlsplit((_served(toto) or {}).get("ui_url") or "")
    if ui.scheme == "https" and ui.hostname:
        mend = "renew the certificate of the proxy (nginx, ACME), and see that it loads the new one"
        found.append(await _tls("address of the UI", ui.hostname, ui.port or 443, ca=None, mend=mend))
    return found


async def _tls(name: str, host: str, port: int, *, ca: Path | None, mend: str) -> Finding:
    """Whether a server answers by a certificate that is trusted, and for how many days that is valid."""
    try:
        trust = ssl.create_default_context(cafile=None if ca is None else str(ca))
        trust.check_hostname = ca is None  # (toto's own authority signs for nobody else)
        async with asyncio.timeout(_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=trust)
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
    except (OSError, TimeoutError) as error:
        return Finding(name, "missing", f"{host}, port {port}: {error or 'no answer'}", mend)
    until = x509.load_der_x509_certificate(shown).not_valid_after_utc
    days = (until - datetime.now(UTC)).days
    said = f"answers at {host}, port {port}; its certificate is valid until {until:%Y-%m-%d} ({days} days)"
    return Finding(name, "warning" if days < _SOON else "ok", said, mend if days < _SOON else "")


CHECKS: Final = (nix_daemon, remote_builders, prefect, postgresql, signs, certificates)
