"""`toto migrate`: the state of a version 0.1.0 that ran as root becomes a user's.

state-0.1.0.tar.xz is what version 0.1.0 left in /srv: a toto with two repositories, of which one has deployed a machine
twice, with a key that its manifest named by a file; a block; a schedule that was switched on; and a push that waits for
its start. It was made by that version (its throwaway keys open nothing).
"""

import asyncio
import json
import os
import pwd
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Final

import pytest

from tests import second_user
from tests.conftest import free_port
from toto.base import paths, process
from toto.base.prefect_api import Api
from toto.server import database, migrate, moves
from toto.server.migrate import Migration

STATE: Final = Path(__file__).with_name("state-0.1.0.tar.xz")
OLD: Final = Path("/srv/toto")
NEW: Final = Path("/srv/new/toto")
REPO: Final = NEW / "server/repos/infra.git"
BUILT: Final = 'derivation {{ name = "{0}"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "{1}" ]; }}'


@pytest.mark.minutes(2)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_root_of_version_0_1_0_becomes_a_user(tmp_path: Path) -> None:
    """All of it runs in a mount namespace, with a /srv and a nix store of its own; see `main`."""
    stage = tmp_path / "stage"
    stage.mkdir()
    command = [sys.executable, "-m", "tests.server.test_migrate"]
    done = second_user.run(command, stage, empty=["/srv", "/nix"], environment={"HOME": "/root"}, timeout=500)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("all is there\n"), done.stdout


@pytest.fixture
def migration(tmp_path: Path) -> Migration:
    """One between two folders of the same user, for the steps that need no root."""
    old = tmp_path / "old"
    for name in (
        "keys/machines",
        "server/repos/a.git/HEAD",
        "repos/b-1/runs/x/file",
        "server/tmp/file",
        "limits.lock",
        "keys/builders",
        "keys/builders.pub",
    ):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(name)
    (old / "keys/machines").chmod(0o600)
    (old / "inside").symlink_to(old / "keys")
    (old / "outside").symlink_to("/etc/passwd")
    os.mkfifo(old / "pipe")
    said: list[str] = []
    user = pwd.getpwuid(os.getuid())
    return Migration(user, old, old / "server", old / "server/repos", tmp_path / "new", say=said.append)


def test_what_lasts_is_copied_and_links_are_links(migration: Migration) -> None:
    old, new = migration.old, migration.new
    count, size, left = migrate._copy(migration, old, new)
    files = {str(each.relative_to(new)) for each in new.rglob("*") if each.is_file() and not each.is_symlink()}
    assert files == {"keys/machines", "server/repos/a.git/HEAD"} and (count, left) == (2, [old / "pipe"])
    assert size == sum(len(each) for each in files)
    assert (new / "keys/machines").stat().st_mode & 0o777 == 0o600
    assert (new / "inside").readlink() == new / "keys" and (new / "outside").readlink() == Path("/etc/passwd")


def test_a_copy_that_broke_off_goes_on(migration: Migration) -> None:
    old, new = migration.old, migration.new
    migrate._copy(migration, old, new)
    (new / "keys/machines").write_text("half")
    (new / "keys/.machines.migrating").write_text("ha")
    (old / "server/repos/a.git/HEAD").write_text("it went on in between")
    migrate._copy(migration, old, new)
    assert (new / "keys/machines").read_text() == "keys/machines"
    assert (new / "server/repos/a.git/HEAD").read_text() == "it went on in between"


def test_what_machines_are_told_moves_with_their_repo(migration: Migration) -> None:
    repo = migration.repos / "a.git"
    told = migration.old / "api/told" / paths.repo_folder(repo)
    (told / "web1").mkdir(parents=True)
    moved = moves.moved(repo.resolve(), migration.moves)
    assert migration.moves[told] == migration.new / "api/told" / paths.repo_folder(moved) != told


def test_the_innermost_folder_says_where_something_has_moved() -> None:
    folders = {Path("/a"): Path("/x"), Path("/a/b"): Path("/y")}
    assert moves.moved(Path("/a/b/c"), folders) == Path("/y/c")
    assert moves.moved(Path("/a/bc"), folders) == Path("/x/bc")
    assert moves.moved(Path("/ab"), folders) == Path("/ab")


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """The files of a folder, with owner, mode and contents."""
    return {
        str(path): (path.lstat().st_uid, path.lstat().st_mode, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.suffix != ".lock"
    }


def built(name: str, script: str = "echo made > $out", root: Path | None = None) -> str:
    """Build something as version 0.1.0 did: as root, without a sandbox."""
    words = ["nix-build", "-E", BUILT.format(name, script), *(["--out-link", root] if root else ["--no-out-link"])]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def toto(*words: str | Path, kill_after: float | None = None, state: Path = OLD) -> subprocess.CompletedProcess[str]:
    """The command line of toto, as root."""
    argv = [sys.executable, "-m", "toto.cli", *words]
    if kill_after is not None:
        argv = ["timeout", "--signal=KILL", str(kill_after), *argv]
    env = {**os.environ, "TOTO_STATE": str(state)}
    return subprocess.run(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def main() -> None:
    with tarfile.open(STATE) as archive:
        archive.extractall("/srv", filter="fully_trusted")
    conf = Path("/srv/nix-conf")
    conf.mkdir()
    (conf / "nix.conf").write_text("build-users-group =\nsandbox = false\nsubstituters =\n")
    os.environ["NIX_CONF_DIR"] = str(conf)
    for place in ("/nix/var/nix", "/nix/store"):
        Path(place).mkdir(parents=True)
    dead, kept = built("dead"), built("kept", root=Path("/srv/somebody-elses-root"))
    mine = built("mine", root=OLD / "repos/infra-94ea5536/good/web1-too")
    different = built("different", "echo $$ $(date +%N) > $out", root=Path("/srv/another-root"))
    before = snapshot(OLD)
    words = ("migrate", "--user", second_user.USER, "--to", NEW)

    tried = toto(*words, "--dry-run")
    assert tried.returncode == 0 and "nothing was changed" in tried.stdout, tried.stdout
    assert "infra: /srv/keys/id_web becomes its key id_web-" in tried.stdout, tried.stdout
    assert "4 paths were built here" in tried.stdout, tried.stdout
    assert not NEW.exists() and snapshot(OLD) == before
    (OLD / "server/repos/elsewhere.git").symlink_to("/srv/keys")
    linked = toto(*words)
    assert linked.returncode == 2 and "elsewhere.git: is a link to /srv/keys" in linked.stdout, linked.stdout
    (OLD / "server/repos/elsewhere.git").unlink()
    for wrong, why in (
        (("migrate", "--user", "root", "--to", NEW), "is root"),
        (("migrate", "--user", "no-such-user", "--to", NEW), "useradd --system"),
        (("migrate", "--user", second_user.USER, "--to", OLD / "new"), "is no place for it"),
        (("migrate", "--user", second_user.USER, "--to", "/srv/keys"), "is not empty"),
    ):
        refused = toto(*wrong)
        assert refused.returncode == 2 and why in refused.stdout, refused.stdout

    for _ in range(6):  # a power cut at any instant
        toto(*words, kill_after=random.uniform(0.7, 2.5))
    broken_off = toto(*words)
    assert broken_off.returncode == 2 and different in broken_off.stdout, "it is not what its derivation makes"
    Path("/srv/another-root").unlink()
    done = toto(*words)
    assert done.returncode == 0, done.stdout
    assert not any(Path(each).exists() for each in (dead, mine, different)) and Path(kept).exists()
    again = toto(*words)
    assert again.returncode == 2 and f"toto has moved to {NEW}" in again.stdout, again.stdout
    assert "toto has moved" in toto("serve", "--sqlite").stdout
    asyncio.run(goes_on())
    a_cluster_moves()
    print("all is there")


def a_cluster_moves() -> None:
    """A PostgreSQL that toto as root had becomes the user's, with all that is in it."""
    old, new = Path("/srv/o"), Path("/srv/p")
    (old / "server").mkdir(parents=True)
    asyncio.run(table_of(old / "server", "CREATE TABLE kept AS SELECT 'a canary' AS word"))
    moved = toto("migrate", "--user", second_user.USER, "--to", new, state=old)
    assert moved.returncode == 0, moved.stdout
    environment = {**os.environ, "TOTO_STATE": str(new), "HOME": str(new)}
    asking = [*second_user.AS_USER, sys.executable, "-m", __spec__.name, str(new / "server"), "SELECT word FROM kept"]
    said = subprocess.run(
        asking, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert said.stdout == "a canary\n", said.stdout


async def table_of(home: Path, query: str) -> str:
    """What a query to the cluster of a home gives."""
    cluster = await database.choose(home)
    assert cluster is not None
    async with cluster.running(home / "logs" / "database.log"):
        connection = await cluster.connect()
        try:
            return str(await connection.fetchval(query))
        finally:
            await connection.close()


async def goes_on() -> None:
    """As the user, it starts; and has what it had."""
    user = pwd.getpwnam(second_user.USER)
    assert {each.lstat().st_uid for each in (NEW, *NEW.rglob("*"))} == {user.pw_uid}
    assert NEW.stat().st_mode & 0o777 == 0o700
    port = free_port()
    environment = {**os.environ, "TOTO_STATE": str(NEW), "HOME": str(NEW)}
    argv = [sys.executable, "-m", "toto.cli"]
    daemon = [*argv, "nix-daemon", "--lifeline", "--group", "nogroup"]
    serve = [*second_user.AS_USER, *argv, "serve", "--sqlite", "--port", str(port)]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(daemon, stdin=pipe, stdout=pipe) as nix,
        subprocess.Popen(serve, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as server,
    ):
        assert server.stdout is not None and nix.stdin is not None and nix.stdout is not None
        assert b"answers" in nix.stdout.readline()
        try:
            said = []
            for line in server.stdout:
                said.append(line)
                if "toto: ready" in line:
                    break
            assert said[-1:] and "ready" in said[-1], "".join(said)
            await there(port)
        finally:
            server.terminate()
            server.wait(60)
            nix.stdin.close()
            nix.wait(60)


async def there(port: int) -> None:
    """What the new toto has."""
    machines = json.loads((NEW / "machines.json").read_text())["machines"]
    assert {name: each["repo"] for name, each in machines.items()} == {"web1": str(REPO)}
    (folder,) = (NEW / "repos").glob("infra-*")
    (key_file,) = (folder / "keys").glob("id_web-????")
    assert key_file.read_bytes() == Path("/srv/keys/id_web").read_bytes()
    assert (folder / "known_hosts").exists()
    environment = {**os.environ, "TOTO_STATE": str(NEW), "HOME": str(NEW)}
    key = [*second_user.AS_USER, sys.executable, "-m", "toto.cli", "key", "infra"]
    public = subprocess.run(key, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert public.split()[1] == (OLD / "keys/machines.pub").read_text().split()[1], "its machines know it by that key"
    assert "user = " in (REPO / "toto/auth.curl").read_text()
    auth = (await process.run([*key[:-2], "password"], env=environment)).stdout.strip()
    api = Api(f"http://127.0.0.1:{port}/api", auth)
    deployments = {each["name"]: each for each in await api.call("POST", "/deployments/filter", {})}
    nightly = [each for each in deployments["reconcile"]["schedules"] if each["slug"] == "nightly"]
    assert [(each["active"], each["parameters"].get("repo")) for each in nightly] == [(True, str(REPO))]
    assert {each["parameters"]["repo"] for each in deployments.values() if "repo" in each["parameters"]} == {str(REPO)}
    documents = await api.call("POST", "/block_documents/filter", {"include_secrets": True})
    secrets = [each["data"] for each in documents if each["name"] == "toto"]
    assert secrets == [{"variables": {"TOKEN": "canary-of-a-block"}}]
    async with asyncio.timeout(120):  # the push that waited is a run of the repo where it is now
        while not (runs := await pushed(api)):
            await asyncio.sleep(0.5)
    assert [each["parameters"]["repo"] for each in runs] == [str(REPO)]
    assert list((REPO / "toto/spool").glob("*.json")) == []


async def pushed(api: Api) -> list[dict[str, Any]]:
    """The runs of pushes that version 0.1.0 has not ended."""
    wanted = {"tags": {"all_": ["push"]}, "state": {"type": {"not_any_": ["COMPLETED"]}}}
    found: list[dict[str, Any]] = await api.call("POST", "/flow_runs/filter", {"flow_runs": wanted})
    return found


if __name__ == "__main__":
    if sys.argv[1:]:
        print(asyncio.run(table_of(Path(sys.argv[1]), sys.argv[2])))
    else:
        main()
