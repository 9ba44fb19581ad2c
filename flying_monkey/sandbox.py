"""Runs a command of the infra repo's tests on a machine, as a user that exists for it alone and may do nothing here.

systemd keeps it: no new rights, a file system that it cannot write to, no home folders, no network but the machine's
own loopback, and limits of memory, processes and time. What it prints is passed on as it comes, up to a bound.
"""

import contextlib
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Final

from flying_monkey import machine
from flying_monkey.machine import Configuration

NOT_RUN: Final = 125  # the exit status when a command could not be run at all
MOST_INPUT: Final = 16 * 2**20  # bytes
_MOST_OUTPUT: Final = 4 * 2**20  # bytes of each output
_MOST_WORDS: Final = 64
_MOST_WORD: Final = 16_384  # bytes
_CHUNK: Final = 65_536  # bytes
_LONGEST: Final = 900  # seconds
SLICE: Final = "flying-monkey-tests.slice"  # bounds all of them together, where the machine's configuration says how
_PROPERTIES: Final = (
    "DynamicUser=yes",
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "ProtectSystem=strict",
    "ProtectHome=yes",
    "ProtectProc=invisible",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "PrivateTmp=yes",
    "PrivateDevices=yes",
    "PrivateMounts=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "KeyringMode=private",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallErrorNumber=EPERM",
    "IPAddressDeny=any",
    "IPAddressAllow=localhost",
    "InaccessiblePaths=-/var/lib/flying-monkey",
    "InaccessiblePaths=-/run/toto",
    "InaccessiblePaths=-/nix/var/nix/daemon-socket",
    "MemoryMax=512M",
    "MemorySwapMax=0",
    "TasksMax=128",
    "LimitCORE=0",
    "LimitFSIZE=256M",
    "CPUWeight=20",
    "UMask=0077",
    "WorkingDirectory=/",
    f"RuntimeMaxSec={_LONGEST}",
)


class NotRun(Exception):
    """A command cannot be run here; the message says why."""


def run(configuration: Configuration, argv: object) -> int:
    """Run a command with this process's input and outputs; its exit status. Raises `NotRun`."""
    if not configuration.tests:
        raise NotRun("this machine runs no tests")
    words = argv if isinstance(argv, list) else []
    if not 1 <= len(words) <= _MOST_WORDS or not all(_is_word(each) for each in words) or not words[0]:
        raise NotRun(f"a test is a list of at most {_MOST_WORDS} words of at most {_MOST_WORD} bytes")
    if not Path("/run/systemd/system").is_dir():
        raise NotRun("this machine has no systemd to keep a test")
    unit = f"flying-monkey-test-{secrets.token_hex(8)}"
    options = [f"--property={each}" for each in _PROPERTIES]
    begin = ["systemd-run", "--pipe", "--wait", "--collect", "--quiet", "--no-ask-password", "--service-type=exec"]
    begin.append(f"--slice={SLICE}")
    path = f"--setenv=PATH={machine.PATH}"
    # (By way of env: a program that is not there is then the test's failure.)
    process = subprocess.Popen(
        [*begin, f"--unit={unit}", path, *options, "--", "/usr/bin/env", "--", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    # (What was read of our input after the request's line is in the buffer.)
    threading.Thread(target=pump, args=(sys.stdin.buffer, process.stdin, MOST_INPUT), daemon=True).start()
    outputs = [
        threading.Thread(target=_pass_on, args=(source, sink), daemon=True)
        for source, sink in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
    ]
    try:
        for each in outputs:
            each.start()
        for each in outputs:
            each.join()
        return process.wait()
    finally:
        with contextlib.suppress(machine.NotReady):
            machine.run("systemctl", "--quiet", "--no-block", "stop", unit, longest=30)


def _is_word(word: object) -> bool:
    return isinstance(word, str) and "\0" not in word and len(word.encode(errors="replace")) <= _MOST_WORD


def _pass_on(source: IO[bytes], sink: IO[bytes]) -> None:
    """What a command prints beyond the bound, or to somebody who is gone, ends it as a closed pipe does."""
    pump(source, sink, _MOST_OUTPUT)
    source.close()


def pump(source: "IO[bytes] | int", sink: IO[bytes], most: int, first: bytes = b"") -> None:
    """Copy what comes to `sink`, as it comes: `first`, and up to `most` bytes of `source`; then close the sink."""
    with contextlib.suppress(OSError, ValueError):
        sink.write(first)
        sink.flush()
        while most > 0 and (chunk := _read(source, min(most, _CHUNK))):
            most -= len(chunk)
            sink.write(chunk)
            sink.flush()
    with contextlib.suppress(OSError, ValueError):
        sink.close()


def _read(source: "IO[bytes] | int", most: int) -> bytes:
    if isinstance(source, int):
        return os.read(source, most)
    chunk: bytes = source.read1(most)  # type: ignore[attr-defined]
    return chunk
