"""A network namespace for cells: a loopback that they share, and an uplink when toto attaches one.

slirp4netns (https://github.com/rootless-containers/slirp4netns) is the uplink: it runs as the namespace's own user and
speaks for it on the machine's network. Before it is attached, nftables closes what is not the internet: private
and link-local addresses, IPv6, and the machine's own addresses. No cell has a capability over the namespace.
"""

import asyncio
import contextlib
import ipaddress
import os
import re
import select
import socket
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from toto.base import files, owned, paths, process
from toto.base.errors import InputError, TotoError
from toto.cell.cell import HOSTS, Stage, as_user, fresh_user, python_at

ALLOWED: Final = "TOTO_ALLOWED_NETWORKS"  # of toto's environment: networks (CIDR) that an uplink leads to besides
_HOLDER: Final = Path(__file__).with_name("holder.py")
# The benchmark range (RFC 2544), which no network uses. QEMU's own user network is 10.0.2.0/24.
_UPLINK: Final = "198.18.0.0/24"
_RESOLVER: Final = "198.18.0.3"
_CARD: Final = "uplink"
# What is not the internet (IANA's special-purpose registry), and multicast.
_CLOSED: Final = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    *("224.0.0.0/3",),
)
_TUN: Final = Path("/dev/net/tun")
_BARE: Final = {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
_PATIENCE: Final = 20.0  # seconds for a helper to be ready, on a busy machine


class NamespaceFailed(TotoError):
    """A network namespace or its uplink could not be made."""


class Namespace:
    """A network namespace; `pid` is the process that holds it. All cells in it have the same `user` of the machine.

    `resolver` is the resolv.conf of its cells, `hosts` their /etc/hosts.
    """

    def __init__(
        self, pid: int, user: int | None, resolver: Path, hosts: Path, toto: socket.socket, uplink: AsyncExitStack
    ) -> None:
        self.pid, self.user, self.resolver, self.hosts = pid, user, resolver, hosts
        self._toto, self._uplink, self._asking = toto, uplink, asyncio.Lock()

    @property
    def entry(self) -> list[str]:
        """The words that make a command of the namespace's user run in it."""
        spaces = f"/proc/{self.pid}/ns"
        return ["nsenter", "--preserve-credentials", f"--user={spaces}/user", f"--net={spaces}/net", "--"]

    @property
    def inside(self) -> list[str]:
        """The words that make a command of toto's own run in it: with all of toto's files, and no uplink of toto's."""
        if os.geteuid() == 0:
            return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]
        return self.entry

    async def connect(self, port: int, address: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to a port in the namespace. Raises OSError."""
        made = await self._made("connect")
        try:
            made.setblocking(False)
            await asyncio.get_running_loop().sock_connect(made, (address, port))
            return await asyncio.open_connection(sock=made)
        except BaseException:
            made.close()
            raise

    async def listen(self, port: int, address: str = "127.0.0.1") -> socket.socket:
        """A socket that listens on a port in the namespace. Raises OSError."""
        return await self._made(f"listen {address} {port}")

    async def add_address(self, address: str) -> None:
        """Make an IPv4 address one of the namespace's own, on its loopback. Raises `NamespaceFailed`."""
        try:
            await process.run(
                [*self._own(), "ip", "address", "replace", f"{address}/32", "dev", "lo"], timeout=_PATIENCE, env=_BARE
            )
        except (process.CommandFailed, process.CommandTimeout) as error:
            raise NamespaceFailed(f"a cell's network has no address {address}: {error.message}") from None

    def name(self, names: Mapping[str, str]) -> None:
        """Give addresses names, for cells that start from now on."""
        with self.hosts.open("a") as file:
            file.writelines(f"{address} {name}\n" for name, address in names.items())

    async def attach(self) -> None:
        """Give the namespace an uplink to the internet, and to the networks that the server's settings name besides.

        Raises `NamespaceFailed`, and `InputError` for wrong settings.
        """
        rules = firewall(os.environ.get(ALLOWED, "").replace(",", " ").split())
        try:
            await process.run([*self._own(), "nft", "-f", "-"], stdin=rules.encode(), timeout=_PATIENCE, env=_BARE)
            await self._uplink.enter_async_context(self._slirp())
        except (process.CommandFailed, process.CommandTimeout) as error:
            raise NamespaceFailed(f"the uplink of a cell failed: {error.message}") from None

    async def detach(self) -> None:
        """Take the uplink away: no route is left."""
        await self._uplink.aclose()

    def _own(self) -> list[str]:
        return [*as_user(self.user), *self.entry]

    @asynccontextmanager
    async def _slirp(self) -> AsyncIterator[None]:
        ready, told = os.pipe()
        words = [
            *("slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", f"--cidr={_UPLINK}"),
            *("--enable-sandbox", "--enable-seccomp", f"--ready-fd={told}", str(self.pid), _CARD),
        ]
        argv = [*_with_tun(), *as_user(self.user), *words]
        try:
            async with process.start(argv, env=_BARE, pass_fds=[told]) as running:
                os.close(told)
                told = -1
                if not await _readable(ready, _PATIENCE):
                    raise NamespaceFailed(
                        f"slirp4netns did not start (status {running.status})",
                        hint="is slirp4netns there, and may this user open /dev/net/tun (udev does `chmod 666`)?",
                    )
                yield
        finally:
            os.close(ready)
            if told >= 0:
                os.close(told)

    async def _made(self, request: str) -> socket.socket:
        async with self._asking:
            return await asyncio.to_thread(self._ask, request)

    def _ask(self, request: str) -> socket.socket:
        self._toto.send(request.encode())
        said, made, *_ = socket.recv_fds(self._toto, 200, 1)
        if not made:
            raise OSError(said.decode() or "the network namespace is gone")
        return socket.socket(fileno=made[0])


@asynccontextmanager
async def namespace(user: int | None = None) -> AsyncIterator[Namespace]:
    """A network namespace that lives as long as the block, without uplink.

    `user` is the machine's user whose it is, when toto is root (default: a fresh one). Raises `NamespaceFailed`.
    """
    user = fresh_user() if user is None else user
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(_PATIENCE)
    with owned.folder("net", Path(tempfile.gettempdir())) as folder, ours, theirs:
        resolver = files.write(folder / "resolv.conf", f"nameserver {_RESOLVER}\n", 0o644)
        hosts = files.write(folder / "hosts", HOSTS, 0o644)
        async with process.start(_holding(user), env=_BARE, stdin=theirs.fileno()) as running:
            theirs.close()
            try:
                ready = await asyncio.to_thread(ours.recv, 20)
            except OSError:
                ready = b""
            if not ready:
                raise NamespaceFailed(
                    f"no network namespace could be made (status {running.status})",
                    hint="may this user make user namespaces? see docs/security.md",
                )
            async with AsyncExitStack() as uplink:
                # The holder is the last of the programs that became it. (Its own id is that of a different namespace.)
                yield Namespace(process.descendants(running.pid)[-1], user, resolver, hosts, ours, uplink)


def _holding(user: int | None) -> list[str]:
    """The command line of the holder. (It is in one user namespace, since `--dev` would nest a second one.)"""
    bwrap = [
        *("bwrap", "--unshare-user", "--uid", "0", "--gid", "0", "--unshare-net", "--unshare-ipc", "--die-with-parent"),
        *("--dev-bind", "/", "/", "--cap-drop", "ALL", "--cap-add", "CAP_NET_BIND_SERVICE", "--"),
    ]
    place, holder = sys.base_prefix, str(_HOLDER)
    stage: list[str] = []
    if os.geteuid() == 0:
        first = Stage()
        place, holder = first.place(Path(sys.base_prefix)), first.place(_HOLDER)
        stage = ["bwrap", *first.words(mounts=False), "--", *as_user(user)]
    return [*stage, *bwrap, "env", *python_at(place), "-I", "-S", holder]


def _with_tun() -> list[str]:
    """The words that give a command of root's a /dev/net/tun that every user may open, where the machine's is not."""
    if os.geteuid() != 0 or _TUN.stat().st_mode & 0o006 == 0o006:
        return []
    node = paths.state_home() / "cells" / "tun"
    if not node.exists():
        node.parent.mkdir(mode=0o700, exist_ok=True)
        fresh = node.with_name(f"tun.{os.getpid()}")
        os.mknod(fresh, stat.S_IFCHR | 0o666, _TUN.stat().st_rdev)
        fresh.chmod(0o666)
        fresh.replace(node)
    capabilities = [word for each in ("CAP_SETUID", "CAP_SETGID") for word in ("--cap-add", each)]
    return [
        "bwrap",
        "--die-with-parent",
        "--dev-bind",
        "/",
        "/",
        "--dev-bind",
        str(node),
        str(_TUN),
        *capabilities,
        "--",
    ]


async def _readable(fd: int, seconds: float) -> bool:
    """Whether something can be read from `fd` within `seconds`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not select.select([fd], [], [], 0)[0]:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            return os.read(fd, 1) == b"1"
    return False


def own_addresses() -> list[str]:
    """The IPv4 addresses of this machine, but for its loopback."""
    text = Path("/proc/net/fib_trie").read_text()
    found = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", text)
    return sorted({each for each in found if not each.startswith("127.")})


def firewall(allowed: Sequence[str] = ()) -> str:
    """The nftables rules of a namespace with an uplink. Raises `InputError` for an `allowed` that is no network."""
    try:
        networks = [str(ipaddress.IPv4Network(each)) for each in allowed]
    except ValueError as error:
        raise InputError(f"{error}", target=ALLOWED, hint="set it to networks such as 192.168.7.0/24") from None
    closed = ", ".join([*_CLOSED, *(each for each in own_addresses() if not _closed(each))])
    opened = f"ip daddr {{ {', '.join(networks)} }} accept" if networks else ""
    return f"""
flush ruleset
table inet toto {{
  chain output {{
    type filter hook output priority 0; policy drop;
    oifname "lo" accept
    ip daddr {_RESOLVER} udp dport 53 accept
    ip daddr {_RESOLVER} tcp dport 53 accept
    {opened}
    ip daddr {{ {closed} }} reject
    meta nfproto ipv4 accept
  }}
  chain input {{
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    ct state established,related accept
  }}
}}
"""


def _closed(address: str) -> bool:
    return any(ipaddress.IPv4Address(address) in ipaddress.IPv4Network(each) for each in _CLOSED)
