"""What nixos-rebuild says when it fails, as the operator reads it."""

import pytest

from toto.machine.activation import rebuild_failed

ADVICE = "error: while running command with remote sudo, did you forget to use --ask-sudo-password?\n"


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (
            4,
            f"warning: the following units failed: web.service\n{ADVICE}",
            "a: `nixos-rebuild switch` exited with status 4:\nwarning: the following units failed: web.service",
        ),
        (
            255,
            f"client_loop: send disconnect: Broken pipe\n{ADVICE}",
            "a: the connection was lost during `nixos-rebuild switch`, which goes on on the machine:\n"
            "client_loop: send disconnect: Broken pipe\n"
            "next: on the machine: journalctl -u nixos-rebuild-switch-to-configuration",
        ),
        (1, ADVICE, "a: `nixos-rebuild switch` exited with status 1"),
    ],
)
def test_a_failed_nixos_rebuild_reads_like_this(status: int, said: str, message: str) -> None:
    assert str(rebuild_failed("switch", status, said, "a")) == message
