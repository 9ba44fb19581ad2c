"""Runs what touches the network in a child process without rights, which hands back bytes and nothing else.

The agent is root. What it reads from the network is read by a child that has become an unprivileged user, has no file
open but a pipe, and is killed when its time is over, whatever it waits for.
"""

import contextlib
import os
import pwd
import resource
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

_SAID: Final = 300  # characters of an error
_GRACE: Final = 5  # seconds after which a child ends by itself that nobody has ended
_OPEN: Final = 64  # files


class Failed(Exception):
    """The work did not end well, or not in time. The message is one line, and may be a stranger's words."""


@dataclass(frozen=True)
class User:
    """Who does the work. The groups are for what asks the nix daemon; what reads the network itself has none."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def user(name: str) -> User | None:
    """The user of that name; None when this process is not root's, and so cannot become anybody else.

    Raises `Failed` when there is none, or when it is root.
    """
    if os.geteuid() != 0:
        return None
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise Failed(f"there is no user {name}") from None
    if found.pw_uid == 0:
        raise Failed(f"{name} is root")
    return User(found.pw_uid, found.pw_gid, tuple(os.getgrouplist(name, found.pw_gid)))


def run(work: Callable[[], bytes], who: User | None, *, longest: float, most: int) -> bytes:
    """What `work` returns, done in a child by `who`: at most `most` bytes, within `longest` seconds.

    Raises `Failed`, also for whatever `work` raises.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(work, who, writing, longest)
    os.close(writing)
    try:
        data = _read(reading, most + 1, time.monotonic() + longest)
    finally:
        os.close(reading)
        for end in (os.kill, os.killpg):  # (what it started is in its group)
            with contextlib.suppress(ProcessLookupError):
                end(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if data[:1] != b"+":
        raise Failed(plain(data[1:]) or "it ended without a word")
    return data[1:]


def become(who: User | None) -> None:
    """Make this process that user's for good, with no groups but the user's own."""
    if who is not None:
        os.setgroups([])
        os.setresgid(who.gid, who.gid, who.gid)
        os.setresuid(who.uid, who.uid, who.uid)


def plain(text: bytes | str) -> str:
    """The first line of a stranger's words, as far as they are printable."""
    words = text.decode(errors="replace") if isinstance(text, bytes) else text
    line = words.strip().partition("\n")[0][:_SAID]
    return "".join(each if " " <= each <= "~" else "?" for each in line)


def _read(reading: int, most: int, deadline: float) -> bytes:
    data = bytearray()
    waiting = select.poll()
    waiting.register(reading, select.POLLIN | select.POLLHUP)
    while (left := deadline - time.monotonic()) > 0:
        if not waiting.poll(left * 1_000):
            continue
        chunk = os.read(reading, 65_536)
        if not chunk:
            return bytes(data)
        data += chunk
        if len(data) > most:
            raise Failed(f"the answer has more than {most - 1} bytes")
    raise Failed("no whole answer in time")


def _child(work: Callable[[], bytes], who: User | None, writing: int, longest: float) -> NoReturn:
    """Do the work, and end: by no way does this process come back to what its parent does."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        signal.alarm(int(longest) + _GRACE)
        _alone(writing)
        become(who)
        data = b"+" + work()
    except Failed as error:
        data = b"-" + str(error).encode(errors="replace")
    except Exception as error:
        data = b"-" + f"{type(error).__name__}: {error}".encode(errors="replace")
    finally:
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(3, data) :]
        os._exit(0)


def _alone(writing: int) -> None:
    """Have no file open but the pipe, as number 3, and write to none."""
    os.dup2(writing, 3)
    os.closerange(4, 4_096)
    nothing = os.open(os.devnull, os.O_RDWR)
    for each in range(3):
        os.dup2(nothing, each)
    os.close(nothing)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN, _OPEN))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
