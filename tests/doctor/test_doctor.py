"""What `toto doctor` finds: real programs that are taken away, real servers that answer or do not."""

import asyncio
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import PrefectServer, free_port
from tests.ledger.test_ledger import deployed as record
from tests.machine.test_ssh import keygen, needs_sshd
from tests.nix.test_builders import as_root, builder, building
from tests.repos import git
from tests.store.test_grants import closure
from toto.api import certificate
from toto.base import files, paths
from toto.base.errors import InputError
from toto.base.prefect_api import ServerError
from toto.doctor import fleet, programs, services, store, system
from toto.doctor.findings import Check, Finding, Toto, examine, text
from toto.ledger.ledger import Entry, Ledger
from toto.ledger.target import HOST, Target
from toto.machine import keys
from toto.metrics.fleet import BACKED_UP
from toto.server.deployments import POOL
from toto.store import grants
from toto.store.exports import Configuration


@pytest.fixture
def toto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toto:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "a state"))
    state = paths.state_home()
    return Toto(state, state / "server", state / "server/repos")


async def found(toto: Toto, *checks: Check) -> dict[str, Finding]:
    return {each.name: each for each in await examine(toto, checks)}


def links(folder: Path, without: str = "") -> str:
    """A PATH that has all that toto starts but one program."""
    folder.mkdir()
    for each in programs.ALL:
        real = shutil.which(each.name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or sys.executable
        if each.name != without:
            (folder / each.name).symlink_to(real)
    return str(folder)


@pytest.mark.parametrize("program", programs.ALL, ids=lambda each: str(each.name))
async def test_a_program_that_is_taken_away_is_named_with_what_brings_it(
    toto: Toto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: programs.Program
) -> None:
    monkeypatch.setattr(programs, "_SYSTEM", "")
    monkeypatch.setattr(programs, "_NIXOS", tmp_path / "none")
    everything, one_less = links(tmp_path / "all"), links(tmp_path / "one less", program.name)
    monkeypatch.setenv("PATH", everything)
    assert [each.status for each in (await found(toto, programs.programs)).values()] == ["ok"]
    monkeypatch.setenv("PATH", one_less)
    if program.roots and os.geteuid() != 0:
        assert program.name not in await found(toto, programs.programs)
        return
    [lacks] = (await found(toto, programs.programs)).values()
    assert (lacks.name, lacks.status) == (program.name, "missing" if program.needed else "warning")
    assert (f"apt install {program.package}" if program.package else "PATH of `toto serve`") in lacks.mend


def test_the_list_of_debians_packages_is_the_same() -> None:
    lines = Path("setup/debian-packages.txt").read_text().partition("#: server")[2].partition("#: lab")[0].splitlines()
    listed = {
        (program, package)
        for package, *named in map(str.split, filter(lambda line: line and line[0] != "#", lines))
        for program in named
    }
    # Not toto's own to start, or looked for by a check of its own (PostgreSQL).
    others = {"xz", "flock", "sshd", "postgres", "initdb", "python:ensurepip", "python:venv"}
    known = {each.name: each.package for each in programs.ALL}
    assert {program for program, _ in listed} - others <= known.keys()
    assert all(known[program] == package for program, package in listed if program in known)


def test_the_command_says_what_is_wrong_first_and_its_status_is_1(toto: Toto, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": links(tmp_path / "links", "bwrap")}

    def doctor(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "toto.cli", "doctor", *words]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)

    done = doctor()
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.startswith("missing ") and "\nok " in done.stdout
    if shutil.which("bwrap", path="/usr/sbin:/sbin") is None and not Path("/etc/NIXOS").exists():
        assert "is not on PATH: makes cells\n         next: apt install bubblewrap\n" in done.stdout
    said = json.loads(doctor("--json").stdout)["items"]
    assert {"name", "status", "said", "mend"} == set(said[0])
    assert "missing" in {each["status"] for each in said}


async def test_a_check_that_hangs_or_fails_is_a_finding_and_holds_up_no_other(toto: Toto) -> None:
    async def hangs(_toto: Toto) -> Sequence[Finding]:
        await asyncio.sleep(3600)
        return []

    async def fails(_toto: Toto) -> Sequence[Finding]:
        raise InputError("is wrong", target="server.toml", hint="mend it")

    async def works(_toto: Toto) -> Sequence[Finding]:
        return [Finding("this", "ok", "is there")]

    said = text(await examine(toto, [works, hangs, fails], at_most=0.1))
    assert said.splitlines() == [
        "missing  hangs  did not answer within 0.1 s",
        "missing  fails  server.toml: is wrong",
        "         next: mend it",
        "ok       this   is there",
    ]


async def test_this_machine_has_its_cells_its_room_and_a_state_that_is_closed(
    toto: Toto, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = await found(toto, system.state, system.rules, system.memory, system.cells)
    assert {each.status for each in seen.values()} == {"ok"}
    toto.state.chmod(0o755)
    files.write(toto.state / "server.toml", "runs = 3\n")
    monkeypatch.setattr(paths, "LEAST_FREE", 10**18)
    monkeypatch.setattr(system, "_LITTLE", 10**18)
    monkeypatch.setenv("TOTO_ACCELERATION", "tcg")
    seen = await found(toto, system.state, system.rules, system.disks, system.kvm)
    assert seen["state"].mend == f"chmod 700 {toto.state}"
    assert seen["rules"].status == "missing" and "server.toml: runs" in seen["rules"].said
    assert seen["disk of the state"].status == "missing" and "prune" in seen["disk of the state"].mend
    assert seen["KVM"].status == "warning" and seen["KVM"].mend


async def test_what_does_not_run_is_missing_and_says_how_to_start_it(
    toto: Toto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOTO_NIX_SOCKET", str(toto.state / "none"))
    monkeypatch.delenv("TOTO_DATABASE_URL", raising=False)
    seen = await found(toto, *services.CHECKS)
    for name in ("nix daemon", "Prefect's server", "signer"):
        assert seen[name].status == "missing" and "toto serve" in seen[name].mend
    monkeypatch.setenv("TOTO_DATABASE_URL", f"postgresql+asyncpg://u:secret@127.0.0.1:{free_port()}/x")
    [lost] = (await found(toto, services.postgresql)).values()
    assert lost.status == "missing" and "secret" not in lost.said


async def test_prefects_server_answers_by_its_password(toto: Toto, prefect_server: PrefectServer) -> None:
    toto.repos.mkdir(parents=True)
    files.write(toto.repos / "server.json", json.dumps({"api_url": prefect_server.api_url}))
    home, workers = Path(prefect_server.env["PREFECT_PROFILES_PATH"]).parent, f"/work_pools/{POOL}/workers"
    with suppress(ServerError):  # those of tests before this one count as online for some time
        for each in await prefect_server.api.call("POST", f"{workers}/filter", {}):
            await prefect_server.api.call("DELETE", f"{workers}/{each['name']}")
    seen = await found(Toto(toto.state, home, toto.repos), services.prefect)
    assert seen["Prefect's server"].status == "ok"
    assert seen["worker"].status == "missing" and "toto serve" in seen["worker"].mend
    if prefect_server.api.auth is not None:
        [locked] = (await found(toto, services.prefect)).values()
        assert locked.status == "missing" and "401" in locked.said


@asynccontextmanager
async def tls(*names: str) -> AsyncIterator[int]:
    own = certificate.own(names)
    trust = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trust.load_cert_chain(own.certificate, own.key)
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=trust) as server:
        yield int(server.sockets[0].getsockname()[1])


async def test_the_server_of_machines_answers_by_its_certificate_or_is_missed(toto: Toto) -> None:
    assert await found(toto, services.certificates) == {}
    async with tls("127.0.0.1") as port:
        files.write(toto.state / "api/listens", f"127.0.0.1 {port}\n")
        [answers] = (await found(toto, services.certificates)).values()
        assert answers.status == "ok" and "valid until 9999-12-31" in answers.said
        (toto.state / "api/ca.pem").unlink()  # of a different authority
        certificate.own(["10.0.0.1"])
        [strange] = (await found(toto, services.certificates)).values()
        assert strange.status == "missing" and "certificate" in strange.said
    [gone] = (await found(toto, services.certificates)).values()
    assert gone.status == "missing" and "toto serve" in gone.mend


def deployed(toto: Toto, manifest: str) -> Path:
    """A repository whose tip has a manifest."""
    repo, work = toto.repos / "infra.git", toto.state / "work"
    git("init", "-q", "--bare", "-b", "main", str(repo), cwd=toto.state)
    git("clone", "-q", str(repo), str(work), cwd=toto.state)
    (work / "machines.yaml").write_text(manifest)
    git("add", ".", cwd=work)
    git("commit", "-q", "-m", "machines", cwd=work)
    git("push", "-q", "origin", "HEAD:refs/heads/main", cwd=work)
    return repo


async def test_keys_contact_and_backup_are_looked_for(toto: Toto) -> None:
    seen = await found(toto, *fleet.CHECKS)
    assert seen["repositories"].mend == "toto repo create infra" and seen["backup"].status == "warning"
    key = await keygen(toto.state / "gate")
    deployed(toto, f"machines:\n- {{name: gate, address: 10.0.0.9, deploy: pull, ssh: {{host_key: {key}}}}}\n")
    seen = await found(toto, *fleet.CHECKS)
    assert seen["flying-monkey on gate"].said == "last heard of: never"
    assert seen["key machines of infra"].status == seen["key store of infra"].status == "missing"
    assert seen["signing key"].status == "missing"
    (toto.state / BACKED_UP).touch()
    assert (await found(toto, fleet.backup))["backup"].status == "ok"
    os.utime(toto.state / BACKED_UP, (0, time.time() - 5 * 86_400))
    assert "120 hours" in (await found(toto, fleet.backup))["backup"].said


@as_root
async def test_who_does_not_find_its_last_good_in_the_cache_is_named(toto: Toto, tmp_path: Path) -> None:
    machines = [
        f"{{name: web{n}, address: 10.0.0.{n}, {how}}}" for n, how in ((1, "substitute: true"), (2, "tags: [x]"))
    ]
    repo = deployed(toto, f"machines: [{', '.join(machines)}]\n")
    assert await found(toto, store.cache) == {}
    good, other = await closure(tmp_path)
    for name in ("web1", "web2"):
        book, target = Ledger(repo), Target(HOST, name)
        await book.write(target, lambda _: Entry(good=record(good)), "good")
    [lacks] = (await found(toto, store.cache)).values()
    assert lacks.name == "cache for web1" and lacks.status == "warning" and "web1 in `only`" in lacks.mend
    await grants.grant(repo, "web1", [good], await keys.make(repo, "cache", "signing"), timeout=60)
    assert (await found(toto, store.cache))["cache"].status == "ok"
    (grants.of(paths.repo_folder(repo), "web1") / f"{Path(other).name[:32]}.narinfo").unlink()
    assert [*await found(toto, store.cache)] == ["cache for web1"], "what it refers to is not there"


async def test_what_is_granted_and_not_exported_by_nfs_is_named(
    toto: Toto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, exported = tmp_path / "toto-store.json", tmp_path / "toto.exports"
    monkeypatch.setattr(store, "_SETTINGS", settings)
    monkeypatch.setattr(store, "_EXPORTS", exported)
    assert await found(toto, store.nfs) == {}
    settings.write_text("{}")
    assert (await found(toto, store.nfs))["NFS"].status == "missing"
    machines = {f"web{n}": {"repo": "infra-1", "address": f"10.0.0.{n}", "diskless": n == 1} for n in (1, 2)}
    granted, nix = grants.prepare(), tmp_path / "nix"
    for name in machines:
        (nix / "store" / name).mkdir(parents=True)
    settings.write_text(json.dumps({"granted": str(granted), "nix": str(nix), "machines": machines}))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(store, "_PORT", server.getsockname()[1])
        assert "0 of 2" in (await found(toto, store.nfs))["NFS"].said, "nothing is granted"
        (granted / "infra-1/web1").mkdir(parents=True)
        assert [*await found(toto, store.nfs)] == ["NFS for web1"]
        exported.write_text("\n".join(Configuration.load(settings).exports()))
        assert "1 of 2" in (await found(toto, store.nfs))["NFS"].said
        exported.write_text(exported.read_text().replace("subtree_check", "no_subtree_check"))
        assert [*await found(toto, store.nfs)] == ["NFS for web1"]
    assert "nobody listens" in (await found(toto, store.nfs))["NFS"].said
    settings.write_text(settings.read_text().replace(str(granted), "/elsewhere"))
    assert await found(toto, store.nfs) == {}, "it is of a different toto"


@needs_sshd
@as_root
async def test_a_builder_builds_or_is_a_warning(
    toto: Toto, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        builder(tmp_path, "one") as one,
        builder(tmp_path, "arm") as arm,
        building(
            monkeypatch, tmp_path_factory.mktemp("a nix"), one.settings(), arm.settings(systems=["aarch64-linux"])
        ),
    ):
        seen = await found(toto, services.nix_daemon, services.remote_builders)
        assert seen["nix daemon"].status == seen["builder one"].status == "ok"
        assert seen["builder arm"].status == "warning"  # it is no such machine
        assert "does not build for aarch64-linux" in seen["builder arm"].said

        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert (await found(toto, services.remote_builders))["builder arm"].status == "ok"
        arm.die()
        [answers, dead] = (await found(toto, services.remote_builders)).values()
        assert answers.status == "ok" and "does not answer" in dead.said
