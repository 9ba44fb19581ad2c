"""What a hostile configuration reaches from terraform's cell: its own root, and what the server names for it."""

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import terraform_provider
from tests.repos import InfraRepo
from tests.terraform.test_session import DEMO, Fleet, data, file, fleet, provider, shell
from toto.base import paths, process
from toto.base.errors import InputError
from toto.cell.relay import Endpoint
from toto.infra_repo import settings
from toto.terraform import endpoints
from toto.terraform import session as terraform
from toto.terraform.session import STATE, Session

__all__ = ["fleet", "provider"]  # the fixtures

pytestmark = [
    pytest.mark.minutes(1),
    pytest.mark.skipif(shutil.which("terraform") is None, reason="THERE IS NO TERRAFORM on this machine"),
]

KEY = "the-private-key-of-toto"
NAP = "98765.25"  # seconds; no other process sleeps that long
# Says what it reaches of files, and of servers on the loopback and in the abstract namespace of sockets.
PROBE = """
import json, os, socket, sys
reached = []
for path in sys.argv[2].split(":"):
    try:
        reached.append(" ".join(os.listdir(path)) if os.path.isdir(path) else open(path).read())
    except OSError:
        pass
port, name = int(sys.argv[3]), sys.argv[4]
for family, place in ((socket.AF_INET, ("127.0.0.1", port)), (socket.AF_UNIX, "\\0" + name)):
    with socket.socket(family) as probe:
        probe.settimeout(10)
        try:
            probe.connect(place)
            reached.append(str(place))
        except OSError:
            pass
reached += [name for name in os.environ if "SECRET" in name]
with open(sys.argv[1], "w") as file:
    json.dump(reached, file)
"""


@contextlib.asynccontextmanager
async def servers(name: str) -> AsyncIterator[int]:
    """Servers on the loopback, and in the abstract namespace under a name; the port of the first."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with (
        await asyncio.start_server(answer, "127.0.0.1", 0) as server,
        await asyncio.start_unix_server(answer, f"\0{name}"),
    ):
        yield server.sockets[0].getsockname()[1]


def secret_places(fleet: Fleet) -> list[Path]:
    """Toto's key, and the cache of a different repo's providers, with something in each; and toto's state."""
    state = paths.state_home()
    key = state / "ssh" / "toto"
    key.parent.mkdir()
    key.write_text(KEY)
    other = paths.repo_state(InfraRepo(fleet.folder / "other").bare) / "terraform-providers"
    other.mkdir()
    (other / "a-provider").write_text("")
    return [key, state, state / "repos", other, fleet.bare, fleet.repo.work]


def make_hostile(provider: Path, words: list[str]) -> Path:
    """A copy of the provider that first runs a command in the background of each of terraform's calls."""
    hostile = provider.parent / f"hostile-{os.urandom(4).hex()}"
    configuration = terraform_provider.install(hostile)
    (program,) = hostile.rglob("terraform-provider-demo*")
    real = program.rename(program.with_name("real"))
    quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
    program.write_text(
        f"#!/bin/sh\nenv -i setsid sleep {NAP} >/dev/null 2>&1 &\n{quoted} >/dev/null 2>&1\nexec {real}\n"
    )
    program.chmod(0o755)
    return configuration


def napping() -> list[str]:
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if each.read_bytes().split(b"\0")[:2] == [b"sleep", NAP.encode()]:
                found.append(each.parent.name)
    return found


@pytest.mark.parametrize("standing", ["deploys", "guest"])
async def test_a_hostile_provider_reaches_nothing_of_totos(
    fleet: Fleet, provider: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, standing: terraform.Standing
) -> None:
    name = f"toto-probe-{os.getpid()}"
    monkeypatch.setenv("TOTO_SECRET", "x")
    async with servers(name) as port:
        places = ":".join(map(str, secret_places(fleet)))
        outside = tmp_path / "outside"
        await process.run(["python3", "-c", PROBE, str(outside), places, str(port), name], timeout=60)
        assert {KEY, "a-provider", "TOTO_SECRET"} < set(json.loads(outside.read_text()))
        assert len(json.loads(outside.read_text())) == 9, "the probe finds everything where there is no cell"
        probe = ["/usr/bin/python3", "-c", PROBE, f"{STATE}/probe", places, str(port), name]
        hostile = make_hostile(provider, probe)
        monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(hostile))
        monkeypatch.setenv("TOTO_CELL_READ", ":".join(map(str, terraform_provider.needs(hostile))))
        session = await of(fleet, DEMO + file("a", STATE / "a", "1"), standing)
        await session.plan()
    assert json.loads((session._home / "probe").read_text()) == []
    assert not napping(), "what a provider leaves behind ends with its call"


async def of(fleet: Fleet, text: str, standing: terraform.Standing) -> Session:
    """A session of a commit, of a run that has this standing."""
    _, tree = await fleet.tree({"terraform/main.tf": text})
    wanted = settings.load(tree).terraform
    (root,) = terraform.discover(tree, wanted)
    return Session(fleet.bare, root, tree, fleet.folder / "runs" / standing, wanted, standing=standing)


@pytest.mark.parametrize("standing", ["guest", "reads"])
async def test_a_plan_that_may_not_be_applied_leaves_nothing_behind(
    fleet: Fleet, provider: Path, monkeypatch: pytest.MonkeyPatch, standing: terraform.Standing
) -> None:
    text = DEMO + file("a", STATE / "a", "1")
    state = await fleet.applied(text)
    script = f"echo spoilt | tee {STATE}/terraform.tfstate.backup /providers/evil; rm -rf {STATE}/a"
    hostile = make_hostile(provider, ["/bin/sh", "-c", script])
    monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(hostile))
    monkeypatch.setenv("TOTO_CELL_READ", ":".join(map(str, terraform_provider.needs(hostile))))
    session = await of(fleet, text, standing)
    planned = await session.plan()
    assert (session._home / "terraform.tfstate.backup").read_text() == "spoilt\n", "the script has run"
    if standing == "guest":
        assert planned.before.empty, "a guest does not see what there is"
    else:
        assert planned.before == state, "and who may read sees a copy"
    assert (fleet.home() / "a").read_text() == "1"
    assert not list(paths.repo_state(fleet.bare).rglob("evil"))
    assert not any("spoilt" in each.read_text() for each in fleet.home().iterdir() if each.is_file())


async def test_a_link_that_terraform_leaves_is_not_followed(fleet: Fleet, tmp_path: Path) -> None:
    key = tmp_path / "x" / "terraform.tfstate"
    key.parent.mkdir()
    key.write_text(KEY)
    links = f"ln -s {key} errored.tfstate; ln -sfn {tmp_path} /state/workspaces"
    await fleet.applied(data("a", "1", shell(links)))
    assert (fleet.home() / "workspaces").is_symlink() and not list(fleet.home().glob("errored-*"))
    session = await of(fleet, data("a", "1"), "reads")
    in_x = replace(session, root=session.root.model_copy(update={"workspace": "x"}))
    in_x._ready()
    assert not list(in_x._home.iterdir()), "a state is not copied by way of a link"
    assert key.read_text() == KEY and key.stat().st_uid == os.geteuid()


async def test_an_endpoint_is_reached_and_its_neighbour_is_not(fleet: Fleet) -> None:
    async with servers("toto-endpoint") as port, servers("toto-neighbour") as other:
        ask = (
            "/usr/bin/python3 -c 'import socket, sys; socket.create_connection((\"127.0.0.1\", int(sys.argv[1])), 10)'"
        )
        text = data("a", "1", shell(f"{ask} {port} && ! {ask} {other} 2>/dev/null"))
        session = await fleet.session(text)
        with pytest.raises(terraform.ApplyFailed):
            await session.apply(await session.plan())
        allowed = replace(await fleet.session(text, run="2"), endpoints=[Endpoint("127.0.0.1", port)])
        await allowed.apply(await allowed.plan())


async def test_a_configuration_of_terraform_that_holds_a_login_is_refused(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tmp_path / "terraform.rc"
    configuration.write_text('credentials "app.terraform.io" {\n  token = "x"\n}\n')
    monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(configuration))
    with pytest.raises(InputError, match="it has credentials, and whatever is pushed reads this file"):
        await (await fleet.session(data("a", "1"))).plan()


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, []),
        ({"PG_CONN_STR": "postgres://u:p%40@db.lan/x?sslmode=disable"}, ["db.lan:5432"]),
        ({"PG_CONN_STR": "postgres://u:p@10.0.0.5:5433,10.0.0.6:5434/x"}, ["10.0.0.5:5433", "10.0.0.6:5434"]),
        ({"PG_CONN_STR": "host=127.0.0.1 port=5433 password='a b'"}, ["127.0.0.1:5433"]),
        ({"PG_CONN_STR": "dbname=x"}, ["localhost:5432"]),
        (
            {"TF_HTTP_ADDRESS": "http://10.0.0.7:8080/state", "TF_HTTP_LOCK_ADDRESS": "https://lock.lan/x"},
            ["10.0.0.7:8080", "lock.lan:443"],
        ),
    ],
)
def test_the_backends_of_the_variables_are_known(variables: dict[str, str], found: list[str]) -> None:
    assert list(map(str, endpoints.of_backends(variables))) == found


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PG_CONN_STR": "host=/run/postgresql dbname=p0ison"}, "it names PostgreSQL by a socket"),
        ({"PG_CONN_STR": "postgres://u:p0ison@[::1]:x/y"}, "it has no host and port that toto can read"),
        ({"TF_HTTP_ADDRESS": "p0ison"}, "it has no host and port that toto can read"),
    ],
)
def test_a_backend_that_cannot_be_reached_is_refused_without_its_secret(variables: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        endpoints.of_backends(variables)
    assert "p0ison" not in str(caught.value)
