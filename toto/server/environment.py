"""The environment of Prefect's server, its worker and their clients, with a reason for each setting."""

import base64
import contextlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import yaml

from toto.base import files, paths
from toto.base.prefect_api import PROFILE, saved_auth
from toto.server import orphans, prune

PORT: Final = 4200
PROFILES: Final = "profiles.toml"
BLOCK_KEY: Final = "TOTO_BLOCK_KEY"
REPOS: Final = "TOTO_REPOS"  # of the server's environment: the folder of the repositories
GRAFANA: Final = "TOTO_GRAFANA_URL"  # the address of a Grafana with toto's dashboards, for links
POSTGRES: Final = "postgresql+asyncpg"  # how the address of Prefect's database begins when that is PostgreSQL


def server_environment(
    home: Path,
    port: int = PORT,
    *,
    host: str = "127.0.0.1",
    database_url: str | None = None,
    auth: str | None = None,
    ui_url: str | None = None,
    base: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of Prefect's server, its worker and their clients.

    `home` contains database, results and leases. It is created, with mode 0700, as the database in it would be
    world-readable otherwise. `auth` is "user:password" of the API (default: the saved one). It is saved in the file of
    Prefect's profiles, mode 0600, where server and clients find it, and is in no environment. `ui_url` is the UI's
    address in a browser, when that is not host and port. `base` is the environment to start from (default: this
    process's). Prefect settings in it are dropped, so that a profile or an API address of the user's own never gets
    toto's runs.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    temporary = home / "tmp"  # Prefect's worker creates a folder with a fixed name in it, which only one user can use
    temporary.mkdir(mode=0o700, exist_ok=True)
    source = os.environ if base is None else base
    env = {name: value for name, value in source.items() if not name.startswith("PREFECT_")}
    address = f"http://{host}:{port}"
    env |= {
        "TMPDIR": str(temporary),
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / PROFILES),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_UI_URL": ui_url or address,
        "PREFECT_SERVER_UI_API_URL": f"{ui_url or address}/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),  # otherwise written beside Prefect's code
        # The default lets in the pages of any site. UI and API are one site, by either name of the loopback.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join((ui_url or address, address, f"http://localhost:{port}")),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # without an API there must be an error, not a second server
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",  # a request, and up to 0.6 s, a flow start
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "results"),
        # The default keeps leases in memory: after the server is killed, their holders would block forever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_WORKER_QUERY_SECONDS": "0.3",  # the default of 10 is most of the wait; less costs over 3 % of a core
        "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(orphans.HEARTBEAT),
        # A schedule that is switched on shows its runs after this many seconds; the default of 60 looks like a fault.
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",
        # By default the database keeps every run and its log forever.
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(prune.DAYS * 86_400),
        "TOTO_REPO": source.get("TOTO_REPO") or str(home / "repos" / "infra.git"),  # the deployment's default
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), env.get("PATH", os.defpath))),
    }
    if not (home / "logging.yml").exists():  # (an operator's own)
        env["PREFECT_LOGGING_SETTINGS_PATH"] = str(_logging(home))
    if database_url is not None:
        env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url
        if database_url.startswith(POSTGRES):
            # The server knows this from the address. Clients that ask for its settings do not, because the address is
            # masked there: `tasks.limits.side_by_side`.
            env["PREFECT_SERVER_DATABASE_DRIVER"] = POSTGRES
    _save_profile(home, f"{address}/api", auth or saved_auth(home / PROFILES))
    return env


def _logging(home: Path) -> Path:
    """The file of the logging settings: Prefect's own, without what its worker says of itself in every run's log."""
    found = importlib.util.find_spec("prefect")
    assert found is not None and found.origin is not None
    settings = yaml.safe_load((Path(found.origin).parent / "logging/logging.yml").read_text())
    settings["loggers"] |= {f"prefect.flow_runs.{name}": {"level": "WARNING"} for name in ("worker", "runner")}
    return files.write(home / "toto-logging.yml", yaml.safe_dump(settings))


def block_key() -> Path | None:
    """The file with the key of the blocks' secrets, if it is there: see `block_key_file`."""
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    places = [*([Path(given) / "toto-blocks"] if given else []), paths.state_home() / "keys" / "blocks"]
    return next((each for each in places if each.is_file()), None)


def block_key_file() -> Path:
    """The file with the key of the blocks' secrets: systemd's credential `toto-blocks`, else one in toto's state.

    That one is made when it is missing. Whoever loses it loses the secrets in the blocks.
    """
    if (there := block_key()) is not None:
        return there
    file = paths.private_folder(paths.state_home() / "keys") / "blocks"
    if not file.exists():
        fresh = files.write(file.with_name(f".blocks.{os.getpid()}"), base64.urlsafe_b64encode(os.urandom(32)).decode())
        with contextlib.suppress(FileExistsError):  # the process that links it first has made the key
            file.hardlink_to(fresh)
        fresh.unlink()
    return file


def password(home: Path) -> str:
    """The "user:password" of the API in `home`: an administrator's. A new one is made when none is saved."""
    return saved_auth(home / PROFILES) or f"admin:{secrets.token_urlsafe(24)}"


def _save_profile(home: Path, url: str, auth: str | None) -> None:
    """Write the file of Prefect's profiles, by which `prefect` and notebooks find the API and its password."""
    values = {"PREFECT_API_URL": url}
    if auth is not None:
        values |= {"PREFECT_API_AUTH_STRING": auth, "PREFECT_SERVER_API_AUTH_STRING": auth}
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    text = f'active = "{PROFILE}"\n\n[profiles.{PROFILE}]\n{lines}'
    file = home / PROFILES
    if not file.exists() or file.read_text() != text:
        files.write(file, text)
