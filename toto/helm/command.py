"""Runs helm as a process: pyhelm3's commands through `toto.base.process`, and errors from helm's own messages.

A chart that is pushed is a program. Helm renders it in a cell, which has neither a cluster nor a kubeconfig.

pyhelm3 (https://github.com/azimuth-cloud/pyhelm3) itself starts a shell; a cancel would end the shell and leave helm
running. Toto does not use its Client, which refuses names with dots, also gets helm's version through a shell, and
repairs a release by rolling it back to the revision before, good or bad.
"""

import logging
import os
import re
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyhelm3  # type: ignore[import-untyped]

from toto.base import process
from toto.base.errors import InputError, TotoError
from toto.cell.cell import HOME, Cell

log = logging.getLogger(__name__)

KEPT: Final = 64_000_000  # bytes of helm's output: a release with its chart, as JSON, may be large
_NOT_FOR_HELM: Final = ("PREFECT_", "TOTO_", "HELM_", "GIT_")
_REFUSED: Final = re.compile("asked for the client to provide credentials|Unauthorized|x509:|loading config file")
_UNREACHABLE: Final = re.compile("[Cc]luster unreachable")
_LOST: Final = re.compile(f"{_UNREACHABLE.pattern}|dial tcp|TLS handshake|connection reset|unexpected EOF")


class HelmError(TotoError):
    """Helm, or the cluster, did not do what was asked."""


class ClusterUnreachable(HelmError):
    """The cluster does not answer. Nothing was touched, and a later try may succeed."""


class AccessRefused(ClusterUnreachable):
    """The cluster answers and refuses the kubeconfig, or the kubeconfig is not valid. Trying again does not help."""


class ChartUnavailable(HelmError):
    """A remote chart cannot be fetched."""


class RenderFailed(InputError):
    """The chart does not render, or the cluster would refuse the result. Nothing was touched."""


class ReleaseBusy(HelmError):
    """A different helm is working on the release, or was killed while it did."""


class ReleaseFailed(HelmError):
    """An upgrade, a rollback or an uninstallation failed. The release may be half done."""


class ReleaseMissing(ReleaseFailed):
    """The release is not installed, although it should be."""


def environment(state: Path, kubeconfig: Path | None) -> dict[str, str]:
    """The environment for helm: this process's, without the variables of toto and Prefect; its files go to `state`."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_FOR_HELM) or name.startswith("HELM_DRIVER")
    }
    ours |= {f"HELM_{what.upper()}_HOME": str(state / what) for what in ("cache", "config", "data")}
    ours["KUBECACHEDIR"] = str(state / "cache" / "kube")  # otherwise ~/.kube/cache
    # A chart of 400 resources is 400 requests; client-go's own limit, 5 a second, is for programs that run for ever.
    ours |= {"HELM_QPS": "100", "HELM_BURST_LIMIT": "500"}
    return ours if kubeconfig is None else ours | {"KUBECONFIG": str(kubeconfig)}


# In a cell helm keeps nothing, and finds no plugin and no login.
IN_CELL: Final = {f"HELM_{what.upper()}_HOME": f"{HOME}/helm/{what}" for what in ("cache", "config", "data")}


class Command(pyhelm3.Command):  # type: ignore[misc]
    """pyhelm3's commands, with helm itself as the process: in its own process group, with a timeout, ended by a cancel.

    `timeout` is in seconds. A failure that helm's message does not explain is raised as `failure`. `secrets` are masked
    in every message. With a `cell` helm runs there, and `environment` is all that it gets.
    """

    def __init__(
        self,
        binary: str,
        environment: dict[str, str],
        *,
        timeout: float,
        failure: type[TotoError],
        target: str | None = None,
        secrets: Sequence[str] = (),
        cell: Cell | None = None,
    ) -> None:
        super().__init__(executable=binary)
        self.binary, self.environment, self.timeout = binary, environment, timeout
        self.failure, self.target, self.secrets = failure, target, secrets
        self.cell = cell

    async def run(self, command: list[Any], input: bytes | None = None) -> bytes:
        """Run helm; return its output. Raises `ReleaseMissing`, `ClusterUnreachable`, `ReleaseBusy`, or `failure`."""
        done = await self.attempt(command, input)
        if done.status != 0:
            raise self.explained(done)
        for line in self.clean(done.stderr).splitlines():
            log.info("%s: %s", self.target, line)
        return done.stdout.encode()

    async def attempt(self, command: list[Any], input: bytes | None = None) -> process.Completed:
        """Run helm and return its result, whatever its exit status. Secrets in the output are not masked.

        On a cancel, helm first marks the release as failed. Raises `failure` (for one that changes a release) or
        `ClusterUnreachable` when it takes longer than `timeout`, `HelmError` when it prints too much.
        """
        try:
            run = process.run if self.cell is None else partial(process.run, cell=self.cell)
            done = await run(
                [self.binary, *map(str, command)],
                env=self.environment,
                stdin=input,
                check=False,
                timeout=self.timeout,
                keep=KEPT,
                target=self.target,
                signals=(signal.SIGINT, signal.SIGTERM),
            )
        except process.CommandTimeout as late:
            what = f"`helm {command[0]}` did not end within {late.seconds:g} s; {self.clean(late.tail)}"
            kind = self.failure if issubclass(self.failure, ReleaseFailed) else ClusterUnreachable
            raise kind(what, target=self.target, hint="is the cluster up?") from None
        if done.truncated:
            raise HelmError(f"`helm {command[0]}` printed more than {KEPT} bytes", target=self.target)
        return done

    def clean(self, text: str) -> str:
        """Helm's text without secrets. (The API server quotes what it could not decode.)"""
        text = re.sub(r", error found in #\d+ byte of .*", "", text)
        return process.tail(process.mask(text, self.secrets))

    def explained(self, done: process.Completed) -> TotoError:
        """The error that helm's message stands for."""
        words = self.clean(done.stderr.rpartition("\nError: ")[2].removeprefix("Error: "))
        if "release: not found" in words:
            return ReleaseMissing("it is not installed", target=self.target)
        if "another operation (install/upgrade/rollback) is in progress" in words:
            return ReleaseBusy(
                "a different helm is working on it, or was killed while it did",
                target=self.target,
                hint="wait for it to end; if it was killed, a later run repairs what it left",
            )
        if self.cell is None and "webhook" not in words:  # (in a cell there is no cluster)
            if _REFUSED.search(words):
                return AccessRefused(words, target=self.target, hint="check the kubeconfig that toto uses")
            # When helm is changing a release, a lost connection is a failure: something may have been touched.
            if (_UNREACHABLE if self.failure is ReleaseFailed else _LOST).search(words):
                return ClusterUnreachable(
                    words, target=self.target, hint="is the cluster up, and is it the one that the kubeconfig names?"
                )
        ended = f"was ended by {signal.Signals(-done.status).name}" if done.status < 0 else "failed without a message"
        return self.failure(words or f"helm {ended}", target=self.target)
