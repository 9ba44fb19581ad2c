"""What machines fetch by NFS, with a real server and real clients, the kernel's own, in one machine of the lab.

The clients web1 and web2 are network namespaces of it, each with an address and mounts of its own. (What WireGuard does
for them elsewhere, an address that is nobody else's, the network does here.)
"""

import json
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from tests.lab import nfs
from tests.lab.debian import DebianMachine
from tests.lab.machine import MachineError
from tests.repos import git
from tests.store import forge
from tests.store.test_grants import closure
from toto.base import paths, process
from toto.machine import keys
from toto.nix import commands as nix
from toto.store import exports, grants

pytestmark = [
    pytest.mark.minutes(2),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not os.environ.get("TOTO_CUTS"), reason="it boots a VM: TOTO_CUTS=1"),
]

GRANTED: Final = "/var/lib/toto/store/granted"
# As nix/store.nix has it, and docs/store.md.
SERVER: Final = "mount -t nfsd nfsd /proc/fs/nfsd && rpc.nfsd -p 2049 -N 3 -V 4.2 --no-udp 2 && rpc.mountd -N 2 -N 3"
MOUNT: Final = "ro,soft,timeo=50,retrans=1,retry=0"
EXPORT: Final = "python3 -IS /root/exports.py /root/config > /etc/exports.d/toto.exports && exportfs -ra"
_NETWORK: Final = """
set -e
printf '[Match]\\nName=web*\\n[Link]\\nUnmanaged=yes\\n' > /etc/systemd/network/05-web.network; networkctl reload
for n in 1 2; do
  ip netns add web$n; ip link add web$n type veth peer name eth0 netns web$n
  ip addr add 10.9.$n.1/24 dev web$n; ip link set web$n up
  ip -n web$n addr add 10.9.$n.2/24 dev eth0; ip -n web$n link set eth0 up
done
"""
_NUMBERS: Final = """
import fcntl, os, struct, sys
for name in sys.argv[1:]:
    file = os.open(name, os.O_RDONLY)
    print(os.fstat(file).st_ino, struct.unpack("I", fcntl.ioctl(file, 0x80087601, bytes(8))[:4])[0])
"""


@dataclass
class Exported:
    """A server, and what its two machines were granted: a closure each, with a program in it."""

    machine: DebianMachine
    folder: str
    public: str
    closures: dict[str, str]
    programs: dict[str, str]

    def fetch(self, cache: str, name: str, store: str = "local") -> str:
        """The command by which nix fetches what a machine was granted, if it is signed by toto's key."""
        words = f"--to {store} --option trusted-public-keys {shlex.quote(self.public)}"
        new = "--extra-experimental-features nix-command"
        return f"NIX_REMOTE= nix {new} copy --from {cache} {words} {self.closures[name]}"

    async def on(self, name: str, script: str, what: str = "") -> str:
        """The output of a script on a machine, which has mounted what it is granted at /mnt/toto."""
        mount = f"mount -t nfs4 -o {MOUNT} 10.9.{name[-1]}.1:{what or f'{GRANTED}/{self.folder}/{name}'} /mnt/toto"
        line = shlex.quote(f"set -e; mkdir -p /mnt/toto; {mount}; {script}")
        return await self.machine.check(f"ip netns exec {name} unshare --mount sh -c {line} 2>&1")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def exported(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Exported]:
    folder = tmp_path_factory.mktemp("nfs")
    login = folder / "login"
    await process.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", login])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOTO_STATE", str(folder / "state"))
        git("init", "--quiet", "--bare", "infra.git", cwd=folder)
        repo = folder / "infra.git"
        async with DebianMachine("toto", folder / "machine", login, address="127.0.31.9") as machine:
            key = await keys.make(repo, "cache", "signing")
            made = Exported(machine, paths.repo_folder(repo), await keys.public_half(key), {}, {})
            for name in ("web1", "web2"):
                program = folder / f"program-{name}"
                shutil.copyfile("/usr/bin/echo", program)  # (the machine has the same Debian)
                with program.open("ab") as end:
                    end.write(name.encode())
                program.chmod(0o755)
                added = (await process.run(["nix-store", "--add", program], env=nix.environment())).stdout.strip()
                made.closures[name], made.programs[name] = await closure(folder, added)
                await grants.grant(repo, name, [made.closures[name]], key, timeout=60)
            await machine.send(_packed(made, folder))
            await nfs.install(machine)
            await machine.check(_NETWORK)
            copied = [made.fetch(f"file://{GRANTED}/{made.folder}/{name}", name) for name in made.closures]
            await machine.check(" && ".join([*copied, EXPORT, SERVER]))
            yield made


def _packed(made: Exported, folder: Path) -> Path:
    """What is on toto's machine: grants, in a state that only toto may enter, and root's two files."""
    machines = {
        name: {"repo": made.folder, "address": f"10.9.{name[-1]}.2", "diskless": True} for name in made.closures
    }
    (folder / "config").write_text(json.dumps({"granted": GRANTED, "nix": "/nix", "machines": machines}))

    def toto(about: tarfile.TarInfo) -> tarfile.TarInfo:
        about.uid = about.gid = 990
        return about

    with tarfile.open(folder / "tar", "w") as tar:
        for name in ("var/lib/toto", "var/lib/toto/store"):
            about = tarfile.TarInfo(name)
            about.type, about.mode = tarfile.DIRTYPE, 0o700
            tar.addfile(toto(about))
        tar.add(grants.granted(), GRANTED.lstrip("/"), filter=toto)
        tar.add(folder / "config", "root/config")
        for module in (exports, forge):
            tar.add(str(module.__file__), f"root/{Path(str(module.__file__)).name}")
    return folder / "tar"


async def test_a_machine_fetches_and_runs_what_it_is_granted_and_changes_nothing(exported: Exported) -> None:
    fetch = exported.fetch("file:///mnt/toto", "web1", "'local?root=/root/web1'")
    said = await exported.on(
        "web1",
        f"{fetch}; /root/web1{exported.programs['web1']} it runs;"
        "for word in touch 'rm -r' 'chmod 777'; do $word /mnt/toto/nix-cache-info || true; done;"
        "mount -o remount,rw /mnt/toto || true; touch /mnt/toto/new || true;"
        "ls /mnt/toto/nar | wc -l",
    )
    assert "it runs" in said and said.count("Read-only file system") == 4, said
    with pytest.raises(MachineError, match="No such file or directory"):
        await exported.on("web1", "true", f"{GRANTED}/{exported.folder}/web2")
    seen = await exported.on("web1", "find /mnt/toto -name '*.narinfo' | grep -c .; find /mnt/toto -path '*web2*'", "/")
    assert seen == "2", "the root of all exports has its own, and no name of the others'"


async def test_a_handle_that_is_made_up_is_refused(exported: Exported) -> None:
    check = exported.machine.check
    base = f"{GRANTED}/{exported.folder}"
    other = f"{base}/web2/{Path(exported.closures['web2']).name[:32]}.narinfo"
    own = f"{base}/web1/{Path(exported.closures['web1']).name[:32]}.narinfo"
    numbers = (await check(f"python3 -c '{_NUMBERS}' {other} /etc/hostname {own}")).splitlines()
    forged = [f"echo $(python3 /root/forge.py /mnt/toto/nix-cache-info {each} 2>&1 | tail -1)" for each in numbers]
    refused = (await exported.on("web1", "; ".join(forged))).splitlines()
    assert refused[:2] == ["ESTALE", "ESTALE"] and "Sig:" in refused[2], "of its own grant it may make up what it likes"
    await check("sed -i s/subtree_check/no_subtree_check/ /etc/exports.d/toto.exports && exportfs -ra")
    try:
        read = (await exported.on("web1", "; ".join(forged))).splitlines()
    finally:
        await check(EXPORT)
    assert "Sig:" in read[0] and read[1] == "toto", "which is why there is subtree_check"


async def test_a_machine_without_a_disk_has_its_store_from_there(exported: Exported) -> None:
    program, closure = exported.programs["web2"], exported.closures["web2"]
    await exported.machine.check(f"mkdir -p /root/web2 && chmod 755 /root/web2 && test ! -e {exports.TREES}/web2/.new")
    said = await exported.on(
        "web2",
        "mount -t tmpfs none /root/web2; mkdir /root/web2/upper /root/web2/work;"
        "mount -t overlay -o lowerdir=/mnt/toto,upperdir=/root/web2/upper,workdir=/root/web2/work none /nix/store;"
        f"{program} it runs; ls /nix/store | wc -l;"
        "export NIX_REMOTE= NIX_STATE_DIR=/root/web2/state;"
        f"nix-store --load-db < /nix/store/{exports.REGISTRATION};"
        f"nix-store --query --requisites {closure} | wc -l;"
        f"nix-store --verify-path $(nix-store --query --requisites {closure}) && echo same",
        f"{exports.TREES}/web2",
    )
    assert said.splitlines() == ["it runs", "3", "2", "same"]


async def test_a_server_that_is_away_or_has_taken_a_grant_back_holds_nobody_up(exported: Exported) -> None:
    check, base = exported.machine.check, f"{GRANTED}/{exported.folder}"
    name = f"{Path(exported.closures['web1']).name[:32]}.narinfo"
    read = f"(cat /mnt/toto/{name} > /dev/null) 2>&1 || echo refused"
    look = f"date +%s; {read}; date +%s"
    said = await exported.on(
        "web1", f"cd /; ip link set eth0 down; {look}; ip link set eth0 up; sleep 1; grep -c Sig: /mnt/toto/{name}"
    )
    assert "Input/output error" in said and "\nrefused\n" in said and said.endswith("\n1"), said
    began, ended = map(int, re.findall(r"^[0-9]{9,}$", said, re.MULTILINE))
    print(f"refused after {ended - began} s")
    export = f"nsenter --target 1 --net sh -c {shlex.quote(EXPORT)}"  # (on the server)
    retire = f"mv {base}/web1 /root/retired; {export}; echo 3 > /proc/sys/vm/drop_caches"  # (what it has read, it has)
    said = await exported.on("web1", f"{retire}; {read}")
    assert said.endswith("refused"), said
    with pytest.raises(MachineError, match=r"No such file or directory|access denied by server"):
        await exported.on("web1", "true")
    await check(f"mv /root/retired {base}/web1; {EXPORT}")
    assert await exported.on("web1", f"grep -c Sig: /mnt/toto/{name}") == "1"
