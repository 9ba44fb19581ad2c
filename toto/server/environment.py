"""The environment of Prefect's server, its worker, and whatever talks to them; each setting with its reason."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from toto.server import orphans, prune

PORT: Final = 4200
POSTGRES: Final = "postgresql+asyncpg"  # how the address of Prefect's database begins when that is PostgreSQL


def server_environment(home: Path, port: int = PORT, *, host: str = "127.0.0.1", database_url: str | None = None,
                       auth: str | None = None, ui_url: str | None = None,
                       base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of Prefect's server, of the worker and of whatever talks to them.

    `home` (made, 0700: the database in it is world-readable otherwise) holds database, results and leases.
    `auth` is "user:password". `ui_url` is where a browser finds the UI, when that is not host and port.
    `base` is what it starts from (default: this process's environment); Prefect settings in it are dropped, so that
    a profile or an API address of the user's own never receives toto's runs.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    temporary = home / "tmp"  # Prefect's worker makes a folder of a fixed name in it, which is one user's alone
    temporary.mkdir(mode=0o700, exist_ok=True)
    source = os.environ if base is None else base
    env = {name: value for name, value in source.items() if not name.startswith("PREFECT_")}
    address = f"http://{host}:{port}"
    env |= {
        "TMPDIR": str(temporary),
        "TOTO_TMPDIR": source.get("TOTO_TMPDIR", source.get("TMPDIR", "")),  # where nix builds: see toto.nix.commands
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_UI_URL": ui_url or address,
        "PREFECT_SERVER_UI_API_URL": f"{ui_url or address}/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),  # otherwise written beside Prefect's code
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # no API must mean an error, not a second server
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",  # a request, and up to 0.6 s, a flow start
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "results"),
        # The default keeps leases in memory: after a kill of the server their holders would block for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_WORKER_QUERY_SECONDS": "0.3",  # the default of 10 is most of the wait; less costs a core 3 % and more
        "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(orphans.HEARTBEAT),
        # A schedule that was switched on shows its runs after that many seconds; the default of 60 looks like a fault.
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",
        # Left to itself the database keeps every run and its log for ever.
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(prune.DAYS * 86_400),
        "TOTO_REPO": source.get("TOTO_REPO") or str(home / "repos" / "infra.git"),  # the deployment's default
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), env.get("PATH", os.defpath))),
    }
    if database_url is not None:
        env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url
        if database_url.startswith(POSTGRES):
            # Says nothing new to the server, which has it from the address; but to whoever asks it for its settings,
            # where the address is masked: `tasks.limits.side_by_side`.
            env["PREFECT_SERVER_DATABASE_DRIVER"] = POSTGRES
    if auth is not None:
        env |= {"PREFECT_SERVER_API_AUTH_STRING": auth, "PREFECT_API_AUTH_STRING": auth}
    return env
