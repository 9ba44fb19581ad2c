"""What may run at the same time, as a real Prefect server and its database allow."""

from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks import limits
from tests.conftest import PrefectServer


async def test_few_subflows_run_side_by_side_on_sqlite(prefect_server: PrefectServer) -> None:
    """(On PostgreSQL: tests/server/test_serve.py.)"""
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url}):
        assert await limits.side_by_side() == limits.ON_SQLITE


async def test_few_subflows_run_side_by_side_where_the_server_does_not_say() -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert await limits.side_by_side() == limits.ON_SQLITE
