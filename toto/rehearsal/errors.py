"""What can go wrong with a sandbox."""

from toto.base.errors import TotoError


class SandboxError(TotoError):
    """Something is wrong with a sandbox, and not with what is tested in it. `console` holds its last lines."""

    def __init__(self, message: str, *, target: str | None = None, hint: str | None = None, console: str = "") -> None:
        said = f"; the last lines of its console:\n{console}" if console else ""
        super().__init__(message + said, target=target, hint=hint)
        self.console = console


class SandboxFailed(SandboxError):
    """The VM cannot be started, or it ended or crashed by itself."""


class BootTimeout(SandboxError):
    """The VM runs and did not answer SSH in time: on a busy machine worth another try."""
