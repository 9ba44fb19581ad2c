"""What the API does for those who should have nothing of it, and what a run cannot be made to start."""

import asyncio
import base64
import contextlib
import json
import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from cryptography.fernet import Fernet

from tests.conftest import free_port
from toto.base import files, process
from toto.base.prefect_api import Api, ServerError
from toto.server import deployments, engine, environment
from toto.server import serve as server

pytestmark = pytest.mark.minutes(1)

AUTH = "admin:the-password"


@contextlib.asynccontextmanager
async def closed(tiny_project: Path, home: Path) -> AsyncIterator[tuple[Api, str]]:
    """A server with a password, and a worker for the flow of `tiny_project`; the id of its deployment."""
    env = environment.server_environment(home, free_port(), auth=AUTH)
    async with server.running_server(env, home / "server.log"):
        [deployment] = (await deployments.deploy(env, root=tiny_project)).values()
        async with (
            server.running_fork_server(env, home / "runs.log", root=tiny_project),
            server.running_worker(env, home / "worker.log", name="here", root=tiny_project),
        ):
            yield Api.of(env), deployment


def asked(api: Api, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(api.url.removesuffix("/api") + path, headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


async def ended(api: Api, run: str, *, seconds: float = 90) -> dict[str, Any]:
    async with asyncio.timeout(seconds):
        while True:
            found: dict[str, Any] = await api.call("GET", f"/flow_runs/{run}")
            if found["state_type"] in {"COMPLETED", "FAILED", "CRASHED"}:
                return found
            await asyncio.sleep(0.2)


@pytest.mark.logs("toto does not start it", "exited with status code: 1", reason="runs are refused on purpose")
async def test_the_api_lets_nobody_in_and_starts_only_what_toto_registered(
    tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # (One server for all: it takes ten seconds to start.)
    async with closed(tiny_project, tmp_path / "home") as (api, deployment):
        basic = "Basic " + base64.b64encode(AUTH.encode()).decode()
        # Nothing without the password, in no environment.
        for path in ("/api/flows/count", "/api/admin/settings", "/api/admin/version", "/api/block_documents/filter"):
            assert asked(api, path)[0] in {401, 405}, path
            assert b"the-password" not in asked(api, path, Authorization=basic)[2]
        assert b"the-password" not in asked(api, "/")[2] + asked(api, "/ui-settings")[2]

        # No other site's page: not by its own name, not by one that leads here, not by a websocket.
        origin = asked(api, "/api/health", Origin="https://evil.example")[1].get("access-control-allow-origin")
        assert origin is None
        assert asked(api, "/api/health", Host="evil.example")[0] == 400
        assert asked(api, "/api/health", Host="localhost")[0] == 200
        address = api.url.replace("http", "ws") + "/events/out"
        with pytest.raises(websockets.InvalidStatus):
            async with websockets.connect(address, origin=websockets.Origin("https://evil.example")):
                pass
        async with websockets.connect(address, subprotocols=[websockets.Subprotocol("prefect")]) as socket:
            await socket.send(json.dumps({"type": "auth", "token": "wrong"}))
            with pytest.raises(websockets.ConnectionClosedError):
                await socket.recv()

        # A run of what toto registered is started.
        create = f"/deployments/{deployment}/create_flow_run"
        run = await api.call("POST", create, {"parameters": {"repo": "x"}})
        first = await ended(api, run["id"])
        assert first["state_type"] == "COMPLETED", first["state"]["message"]

        # The caller's command, environment and folder are refused, or do nothing.
        touch = {"command": f"touch {tmp_path}/command", "working_dir": str(tmp_path)}
        for variables in (
            touch,
            {"env": {"PREFECT__FLOW_ENTRYPOINT": f"{tmp_path}/evil.py:evil"}},
            {"env.LD_PRELOAD": "x"},
        ):
            with contextlib.suppress(ServerError):
                made = await api.call("POST", create, {"parameters": {"repo": "x"}, "job_variables": variables})
                await ended(api, made["id"])
            with contextlib.suppress(ServerError):
                await api.call("PATCH", f"/deployments/{deployment}", {"job_variables": variables})
                made = await api.call("POST", create, {"parameters": {"repo": "x"}})
                await ended(api, made["id"])
            with contextlib.suppress(ServerError):
                await api.call("PATCH", f"/deployments/{deployment}", {"job_variables": {}})

        # A different entrypoint, a pull step that is a command, a run without a deployment: none is started.
        (tmp_path / "evil.py").write_text(
            f"from pathlib import Path\nPath({str(tmp_path / 'import')!r}).touch()\n"
            "from prefect import flow\n@flow\ndef evil(repo: str = '') -> None: pass\n"
        )
        step = {"prefect.deployments.steps.run_shell_script": {"script": f"touch {tmp_path}/step"}}
        was = await api.call("GET", f"/deployments/{deployment}")
        for change in ({"entrypoint": f"{tmp_path}/evil.py:evil"}, {"pull_steps": [step]}):
            try:
                await api.call("PATCH", f"/deployments/{deployment}", change)
                made = await api.call("POST", create, {"parameters": {"repo": "x"}})
            except ServerError:
                body = {**{key: was[key] for key in ("name", "flow_id", "work_pool_name", "entrypoint")}, **change}
                other = await api.call("POST", "/deployments/", body)
                made = await api.call(
                    "POST", f"/deployments/{other['id']}/create_flow_run", {"parameters": {"repo": "x"}}
                )
            refused = await ended(api, made["id"])
            assert refused["state_type"] == "CRASHED", refused["state"]
            assert "toto does not start it" in refused["state"]["message"]
            await api.call("PATCH", f"/deployments/{deployment}", {"entrypoint": was["entrypoint"], "pull_steps": []})
        left = {each.name for each in tmp_path.iterdir()}
        assert not left & {"command", "import", "step"}, left


@pytest.mark.parametrize(
    "change",
    [
        {"entrypoint": "flows/evil.py:reconcile"},
        {"entrypoint": None},
        {"name": "other"},
        {"pull_steps": [{"prefect.deployments.steps.run_shell_script": {}}]},
        {"storage_document_id": "00000000-0000-0000-0000-000000000000"},
    ],
)
def test_a_deployment_must_be_as_it_was_registered(tiny_project: Path, change: dict[str, Any]) -> None:
    as_registered = {
        "name": "reconcile",
        "entrypoint": "flows/reconcile.py:reconcile",
        "pull_steps": None,
        "storage_document_id": None,
    }
    assert engine.entrypoint(as_registered, tiny_project) == "flows/reconcile.py:reconcile"
    with pytest.raises(engine.NotRegistered):
        engine.entrypoint(as_registered | change, tiny_project)
    with pytest.raises(engine.NotRegistered):
        engine.entrypoint(None, tiny_project)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--host", "0.0.0.0"],
        ["--host", "192.168.1.2", "--behind-proxy"],
        ["--host", "toto.example.org", "--ui-url", "https://x"],
    ],
)
def test_it_listens_on_loopback_only_unless_a_proxy_does_tls(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path))
    assert server.main(["--home", str(tmp_path / "home"), *arguments]) == 1
    assert "is not loopback" in capsys.readouterr().err


def test_a_lock_can_be_held_by_nobody_else(tmp_path: Path) -> None:
    with files.lock(tmp_path / "lock"):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


SAVE = "from prefect.blocks.system import Secret; Secret(value='the-secret').save('s', overwrite=True)"
LOAD = "from prefect.blocks.system import Secret; print(Secret.load('s').get())"


async def test_the_key_of_the_blocks_is_not_in_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state in which Prefect's own key is in the database: it is encrypted anew at the next start."""
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    env = environment.server_environment(tmp_path / "home", free_port(), auth=AUTH)

    async def ran(program: str) -> str:
        return (await process.run([sys.executable, "-c", program], env=env, timeout=120)).stdout.strip()

    def stored() -> tuple[list[Any], list[Any]]:
        with contextlib.closing(sqlite3.connect(tmp_path / "home" / "prefect.db")) as database:
            keys = database.execute("SELECT key FROM configuration WHERE key = 'ENCRYPTION_KEY'").fetchall()
            return keys, database.execute("SELECT data FROM block_document WHERE name = 's'").fetchall()

    async with server.running_server(env, tmp_path / "home" / "server.log"):
        await ran(SAVE)
    keys, [[before]] = stored()
    assert len(keys) == 1
    key = environment.block_key_file()
    assert key == environment.block_key_file() and key.stat().st_mode & 0o777 == 0o600
    for _ in range(2):
        async with server.running_server(env | {environment.BLOCK_KEY: str(key)}, tmp_path / "home" / "server.log"):
            assert await ran(LOAD) == "the-secret"
            keys, [[after]] = stored()
    assert keys == [] and after != before
    assert "the-secret" in Fernet(key.read_bytes()).decrypt(json.loads(after).encode()).decode()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "toto-blocks").write_bytes(Fernet.generate_key())
    assert environment.block_key_file() == tmp_path / "toto-blocks"
