"""The key that encrypts the secrets in Prefect's blocks: a file that does not lie beside the database.

By default Prefect keeps the key in the database, so that whoever gets a copy of the database, such as a backup, can
read every secret in it. Here the key is in toto's state, or is a credential of systemd's. What Prefect's own key has
encrypted can still be read; the server's start encrypts it anew, in one transaction, and removes that key.

It runs in Prefect's server (`toto.server.app`).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from cryptography.fernet import Fernet, MultiFernet
from fastapi import FastAPI
from prefect.server.database import provide_database_interface
from prefect.server.models import configuration
from prefect.server.utilities import encryption
from sqlalchemy.ext.asyncio import AsyncSession

_configuration: Any = configuration  # (its functions lose their types to a decorator)
_PREFECTS: Final = "ENCRYPTION_KEY"  # the entry of the database with Prefect's own key


def install(app: FastAPI, file: Path) -> None:
    """Have `app` encrypt blocks with the key in `file`. Raises OSError, and ValueError when it holds no key."""
    key = Fernet(file.read_bytes().strip())

    async def keys(session: AsyncSession) -> MultiFernet:
        old = await _prefects_own(session)
        return MultiFernet([key, *([Fernet(old)] if old else [])])

    encryption._get_fernet_encryption = keys  # type: ignore[assignment]
    prefects: Any = app.router.lifespan_context

    @asynccontextmanager
    async def life(application: FastAPI) -> AsyncIterator[object]:
        async with prefects(application) as state:
            await _encrypt_anew()
            yield state

    app.router.lifespan_context = life  # type: ignore[assignment]


async def _encrypt_anew() -> None:
    """Encrypt with toto's key what Prefect's own has encrypted, and forget that key: all of it, or nothing."""
    database = provide_database_interface()
    async with database.session_context(begin_transaction=True) as session:
        if await _prefects_own(session) is None:
            return
        for document in (await session.execute(sqlalchemy.select(database.BlockDocument))).scalars():
            await document.encrypt_data(session, await document.decrypt_data(session))
        await _configuration.delete_configuration(session, _PREFECTS)


async def _prefects_own(session: AsyncSession) -> str | None:
    found = await _configuration.read_configuration(session, _PREFECTS)
    return None if found is None else str(found.value["fernet_key"])
