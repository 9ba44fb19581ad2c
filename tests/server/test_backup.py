"""A backup, the loss of everything, and a restore: real repositories, ledger, signer and PostgreSQL."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests import clean_logs
from tests.conftest import free_port
from tests.git_host.test_host import Pusher
from tests.lab.setup import setup
from tests.ledger.test_ledger import WEB1, deployed, intent
from tests.machine.test_signer import HOST_KEY, added
from tests.server.test_serve import Part, until
from toto.base import files, paths
from toto.base.errors import InputError
from toto.base.prefect_api import Api
from toto.git_host import host as git_host
from toto.git_host import shared
from toto.infra_repo.manifest import SSH, Machine
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.machine import keys, owners, signer, signing_key
from toto.server import backup, deployments
from toto.server.backup import Place

pytestmark = pytest.mark.minutes(1)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short one: the path of PostgreSQL's socket has at most 107 characters."""
    return tmp_path_factory.mktemp("b")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    state = tmp_path / "state"
    monkeypatch.setenv("TOTO_STATE", str(state))
    paths.state_home()
    (state / "server").mkdir(mode=0o700)
    clean_logs.watch(state / "server/logs")
    return Place(state, state / "server", state / "server/repos")


async def furnished(place: Place, folder: Path) -> Path:
    """An infra repo with a machine, a key, a serial, a local state, and the server's rules."""
    repo = await git_host.make(place.repos, "infra", creator="alice")
    shared.claim(repo, "infra")
    key = folder / "alice.pub"
    key.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGr2d1b6cs9o1bfVn2dP7Wt6zD0mQyAqH1xS5dOJ1k2f")
    await git_host.make_admin(place.repos, "alice", key.read_text())
    await keys.of_machines(repo)
    await signing_key.current()
    await owners.claim(repo, Machine(name="web1", address="10.0.0.1", ssh=SSH()), [HOST_KEY])
    book, good = Ledger(repo), await added(folder, "good")
    await book.write(WEB1, steps.intend(intent("run-1", good)), "intend")
    await book.write(WEB1, steps.good(deployed(good), "run-1"), "good")
    await book.write(WEB1, steps.intend(intent("run-2", await added(folder, "new"))), "intend")
    await book.write(WEB1, lambda entry: steps.set_step(entry, "run-2", "test"), "test")
    files.write(place.state / "server.toml", "resume_button = true\n")
    local = paths.repo_state(repo) / "terraform/dns/terraform.tfstate"
    local.parent.mkdir(parents=True)
    local.write_text('{"serial": 7}')
    return repo


def contents(place: Place) -> dict[str, tuple[int, bytes]]:
    """All files that last, and where every ref of every repository is."""
    found = {
        str(each.relative_to(place.state)): (each.stat().st_mode & 0o777, each.read_bytes())
        for each in [*place.lasting(), *(repo / name for repo in place.repositories() for name in backup._REPO)]
        if each.exists()
    }
    for repo in place.repositories():
        refs = subprocess.run(["git", "-C", repo, "for-each-ref"], capture_output=True, check=True).stdout
        found[f"refs of {repo.name}"] = (0, refs)
    return found


async def serial(repo: Path, reported: int = 0) -> int:
    asked = signer.Request(repo=str(repo), machine="web1", phase="try", activation="switch", reported=reported)
    return (await signer.document(asked, NOW)).serial


async def test_what_was_lost_is_as_it_was_and_serials_go_on(place: Place, tmp_path: Path) -> None:
    setup()
    repo = await furnished(place, tmp_path)
    newest = await serial(repo)
    before = contents(place)
    file, said = tmp_path / "backup.tar", list[str]()
    await backup.backup(place, file, said.append)
    assert file.stat().st_mode & 0o777 == 0o600
    assert any("web1 is being changed just now" in line for line in said)
    with tarfile.open(file) as tar:
        assert tar.next() is not None and tar.getnames()[0] == "backup.json"
        assert not any("auth.curl" in name or "/hooks/" in name for name in tar.getnames())
    handed_out = await serial(repo)  # after the backup: the machine has had it
    good = paths.repo_state(repo) / "good"
    good.mkdir()
    (good / "web1").symlink_to("/nix/store")

    shutil.rmtree(place.repos)
    for each in list(place.lasting()):
        each.unlink()
    (place.state / "machines.json").write_text("{broken")
    await backup.restore(place, file, said.append)
    assert contents(place) == before
    assert subprocess.run(["git", "-C", repo, "fsck", "--strict"], check=False).returncode == 0
    assert (good / "web1").is_symlink(), "what keeps systems from garbage collection stays"
    aside = next(place.state.glob("replaced-*"))
    assert (aside / "machines.json").read_text() == "{broken" and not (place.state / "restoring").exists()
    assert owners.read().machines["web1"].repo == repo.resolve()
    assert await serial(repo, reported=handed_out) == handed_out + 1 > newest + 1
    assert shared.is_free(repo, "infra") and not shared.is_free(repo.with_name("other.git"), "infra")


async def test_a_toto_that_runs_is_backed_up_and_one_of_the_backup_serves(
    tiny_project: Path, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an operator: `toto backup` beside `toto serve`, `rm -r`, `toto restore`, `toto serve`."""
    repo, port = await git_host.make(place.repos, "infra"), free_port()
    pusher = Pusher(tmp_path / "clone", repo)
    file = tmp_path / "backup.tar"

    def toto(*words: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "toto.cli", *words], capture_output=True, text=True, check=False)

    first = await Part.begin(tiny_project, place.home, port)
    try:
        api = Api(f"http://127.0.0.1:{port}/api", toto("password").stdout.strip())
        await api.call("POST", "/variables/", {"name": "kept", "value": "yes"})
        pusher.push()
        done = await asyncio.to_thread(toto, "backup", file)
        assert done.returncode == 0, done.stderr
        refused = await asyncio.to_thread(toto, "restore", file)
        assert refused.returncode == 2 and "already runs" in refused.stderr
        await asked_to_leave(first, api)
    finally:
        first.kill()
    tip = pusher.git("rev-parse", "HEAD")
    for each in place.state.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    with file.open("rb") as source:
        done = subprocess.run(
            [sys.executable, "-m", "toto.cli", "restore", "-"],
            stdin=source,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    second = await Part.begin(tiny_project, place.home, port)
    try:
        assert (await api.call("GET", "/variables/name/kept"))["value"] == "yes"
        assert pusher.git("ls-remote", str(repo), "refs/heads/main").split()[0] == tip
        pusher.commit()
        assert "toto: rehearsing" in pusher.push()
        await second.end()
    finally:
        second.kill()


async def asked_to_leave(part: Part, api: Api) -> None:
    """SIGHUP, as `systemctl reload` sends it when toto's own machine is deployed: the run goes on to its end."""
    [deployment] = (await deployments.deployments(api)).values()
    run = await api.call(
        "POST", f"/deployments/{deployment}/create_flow_run", {"parameters": {"repo": "x", "seconds": 6}}
    )
    await until(api, run["id"], {"RUNNING"})
    part.process.send_signal(signal.SIGHUP)
    await until(api, run["id"], {"COMPLETED"})
    assert await asyncio.to_thread(part.process.wait, 60) == 0
    assert part.process.stdout and "it ends as soon as no run is under way" in part.process.stdout.read()


def tar_with(
    file: Path, about: dict[str, object] | None, *, name: str = "keys/x", kind: bytes = tarfile.REGTYPE
) -> Path:
    with tarfile.open(file, "w") as tar:
        if about is not None:
            (file.parent / "backup.json").write_text(json.dumps(about))
            tar.add(file.parent / "backup.json", "backup.json")
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    return file


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file, about: tar_with(file, about, name="../x"), "which no backup has"),
        (lambda file, about: tar_with(file, about, name="/x"), "which no backup has"),
        (lambda file, about: tar_with(file, about, kind=tarfile.SYMTYPE), "which no backup has"),
        (lambda file, about: tar_with(file, None), "is no backup of toto"),
        (lambda file, about: tar_with(file, about | {"version": 2}), "is of version 2"),
        (lambda file, about: tar_with(file, about | {"state": "/srv/toto"}), "TOTO_STATE=/srv/toto"),
        (lambda file, about: file, "cannot be read"),
    ],
)
async def test_what_is_no_backup_changes_nothing(
    place: Place, tmp_path: Path, make: Callable[[Path, dict[str, object]], Path], words: str
) -> None:
    about = {
        "version": 1, "at": "", "state": str(place.state), "home": str(place.home), "repos": str(place.repos),
        "database": "none",
    }  # fmt: skip
    files.write(place.state / "server.toml", "kept")
    with pytest.raises(InputError, match=words):
        await backup.restore(place, make(tmp_path / "file.tar", about), print)
    assert (place.state / "server.toml").read_text() == "kept"
    assert not (tmp_path / "x").exists() and not list(place.state.glob("re*"))


async def test_a_state_that_terraform_is_writing_is_waited_for(tmp_path: Path) -> None:
    file, copy = tmp_path / "terraform.tfstate", tmp_path / "copy"
    file.write_text('{"half": ')

    async def finish() -> None:
        await asyncio.sleep(0.3)
        file.write_text('{"half": "whole"}')

    await asyncio.gather(backup._copy(file, copy), finish())
    assert json.loads(copy.read_text()) == {"half": "whole"}


async def test_nobody_else_s_state_is_taken(place: Place) -> None:
    with pytest.raises(InputError, match="is not in toto's state"):
        Place(place.state, place.state.parent, place.repos)
    if os.geteuid() == 0:
        os.chown(place.state, 65534, 65534)
        with pytest.raises(InputError, match="run it as that user"):
            Place(place.state, place.home, place.repos)
