"""A Prometheus on a machine of its own, as an operator sets it up, reads toto and a machine of the fleet over TLS."""

import asyncio
import contextlib
import json
import os
import shlex
import subprocess
import time
import urllib.parse
from pathlib import Path
from typing import Any, Final

import pytest

from flying_monkey import metrics as agent
from tests.conftest import free_port
from tests.flying_monkey.test_metrics import STATE
from tests.lab.debian import DebianMachine
from tests.metrics.fleet import SmallFleet
from tests.metrics.test_prometheus import MONITORING, configuration, started, with_tls
from toto.api import certificate
from toto.metrics import token
from toto.server import environment
from toto.server import serve as server

pytestmark = [
    pytest.mark.minutes(2),
    pytest.mark.skipif(not os.environ.get("TOTO_CUTS"), reason="it boots a VM: TOTO_CUTS=1"),
]

HERE: Final = "10.0.2.2"  # this machine, as that one sees it
NAME: Final = "toto.example.org"
PLACE: Final = "/etc/prometheus"
SECRET: Final = "what all machines' exporters ask for"
CREDENTIALS: Final = f"""scheme: https
    tls_config: {{ca_file: {PLACE}/ca.pem}}
    basic_auth: {{username: prometheus, password_file: {PLACE}/machines}}"""
ASK: Final = (
    "import sys, urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9090/' + sys.argv[1]).read().decode())"
)


class Elsewhere:
    """The machine with the Prometheus."""

    def __init__(self, folder: Path, settings: str) -> None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        texts = {
            "prometheus.yml": settings,
            "alerts.yml": (MONITORING / "alerts.yml").read_text(),
            "ca.pem": certificate.authority().read_text(),
            "toto.token": token.file().read_text(),
            "machines": SECRET,
        }
        files = {f"{PLACE}/{name}": (text, 0o600) for name, text in texts.items()}
        self.machine = DebianMachine("btg", folder / "btg", folder / "key", address="127.0.8.10", files=files)

    async def begin(self) -> None:
        """Start the program of Debian, which is a single file."""
        words = [*self.machine.ssh_options, f"root@{self.machine.address}", "cat > /usr/local/bin/prometheus"]
        with Path("/usr/bin/prometheus").open("rb") as program:
            await asyncio.to_thread(subprocess.run, ["ssh", *words], stdin=program, check=True)
        settings = f"--config.file={PLACE}/prometheus.yml --web.listen-address=127.0.0.1:9090"
        await self.machine.check(
            f"chmod +x /usr/local/bin/prometheus; echo {HERE} {NAME} >> /etc/hosts; "
            f"systemd-run --quiet --unit=prometheus prometheus --storage.tsdb.path=/var/tmp/data {settings}"
        )

    async def until(self, query: str) -> list[dict[str, Any]]:
        """What a query finds, once it finds something."""
        asked = "api/v1/query?" + urllib.parse.urlencode({"query": query})
        line = shlex.join(["python3", "-c", ASK, asked])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(300):
                while True:
                    said = await self.machine.ssh(line, login=False)
                    if said.status == 0 and (found := json.loads(said.out)["data"]["result"]):
                        return list(found)
                    await asyncio.sleep(2)
        log = await self.machine.ssh("journalctl -u prometheus -n 20 --no-pager -o cat", login=False)
        targets = await self.machine.ssh(shlex.join(["python3", "-c", ASK, "api/v1/targets"]), login=False)
        raise AssertionError(f"nothing for {query}:\n{log.out}\n{targets.out}{targets.err}")


async def test_it_reads_toto_and_a_machine_by_tls_and_with_credentials(fleet: SmallFleet, tmp_path: Path) -> None:
    home, port, exporter = tmp_path / "state/server", free_port(), free_port()
    env = environment.server_environment(home, port, auth="toto:secret", ui_url=f"https://{NAME}")
    made = certificate.own(["127.0.0.1", HERE, NAME])
    hashed = subprocess.run(
        ["perl", "-e", "print crypt($ARGV[0], q($2b$04$abcdefghijklmnopqrstuu))", SECRET],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    web = {
        "tls_server_config": {"cert_file": str(made.certificate), "key_file": str(made.key)},
        "basic_auth_users": {"prometheus": hashed},
    }
    (tmp_path / "web.yml").write_text(json.dumps(web))
    agent.write(tmp_path / "flying-monkey.prom", {**STATE, "contact": time.time()})
    listening = [f"--web.listen-address=127.0.0.1:{exporter}", f"--web.config.file={tmp_path / 'web.yml'}"]
    textfile = f"--collector.textfile.directory={tmp_path}"
    env |= {environment.REPOS: str(fleet.repos)}
    async with server.running_server(env, home / "server.log"), with_tls(port, HERE, NAME) as toto:
        more = {"job_name: node\n": f"job_name: node\n    {CREDENTIALS}\n", "$1:9100": f"{HERE}:{exporter}"}
        more["30s"] = "10s"  # (the machine is emulated: TLS takes it some seconds)
        elsewhere = Elsewhere(tmp_path, configuration(f"{NAME}:{toto}", f"{PLACE}/ca.pem", more))
        with started("prometheus-node-exporter", *listening, textfile, log=tmp_path / "exporter.log"):
            async with elsewhere.machine:
                await elsewhere.begin()
                assert await elsewhere.until('up{job="toto"}==1')
                assert await elsewhere.until('up{job="node",machine="web1",repo="infra"}==1')
                assert await elsewhere.until("flying_monkey_up")
                [half] = await elsewhere.until('ALERTS{alertname="HalfDone",target="web2"}')
                assert half["metric"]["alertstate"] == "pending"
                # With a different credential neither of them says a word.
                await elsewhere.machine.check(f"echo no > {PLACE}/toto.token; echo no > {PLACE}/machines")
                await elsewhere.until('count(up{job=~"toto|node"}==0)==3')
