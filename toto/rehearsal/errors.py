"""The errors of sandboxes."""

from toto.base.errors import TotoError


class SandboxError(TotoError):
    """Something is wrong with a sandbox, not with what is tested in it. `console` has the last lines of its console."""

    def __init__(self, message: str, *, target: str | None = None, hint: str | None = None, console: str = "") -> None:
        said = f"; the last lines of its console:\n{console}" if console else ""
        super().__init__(message + said, target=target, hint=hint)
        self.console = console


class SandboxFailed(SandboxError):
    """The VM did not start, or it ended or crashed."""


class BootTimeout(SandboxError):
    """The VM runs, but did not answer SSH in time. On a busy machine a retry may work."""
