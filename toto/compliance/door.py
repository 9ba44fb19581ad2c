"""InSpec's way to the machine: an ssh server in its cell, whose commands go through `on-host`.

InSpec connects by an ssh of its own, which wants a key and does not look at host keys. No key of a machine enters a
cell, so it is given a server that is nobody's: sshd answers on its standard input and output (`--proxy-command`), with
keys that the cell makes for itself, and hands each command to `on-host`. Toto connects to the machine, by its own ssh.
"""

import shlex
from pathlib import Path
from typing import Final

PLACE: Final = Path("/compliance")  # in the cell: the folder of these programs
KEYS: Final = "/tmp/door"  # noqa: S108  (in the cell: its own)
ENTER: Final = f"{PLACE}/enter"  # makes the cell's keys, and becomes the command that follows
OPTIONS: Final = (
    *("--target", "ssh://cell@machine", "--key-files", f"{KEYS}/client"),
    *("--proxy-command", f"{PLACE}/serve"),
)
_SSHD_CONFIG: Final = f"""\
HostKey {KEYS}/host
AuthorizedKeysFile {KEYS}/client.pub
ForceCommand {PLACE}/forward
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
PidFile none
LogLevel ERROR
"""
# The keys are of a kind and in a format that net-ssh reads without further libraries.
_ENTER: Final = f"""\
#!/bin/sh -e
mkdir -p -m 0700 {KEYS}
for each in host client; do ssh-keygen -q -t ecdsa -m PEM -N '' -C '' -f {KEYS}/$each; done
exec "$@"
"""
_SERVE: Final = f"""\
#!/bin/sh
exec "$(command -v sshd)" -i -e -f {PLACE}/sshd_config
"""


def write(folder: Path, search_path: str) -> None:
    """Write the door's programs into a folder that the cell sees at `PLACE`. `on-host` is on `search_path` there."""
    forward = f'#!/bin/sh\nPATH={shlex.quote(search_path)} exec on-host --stdin "$SSH_ORIGINAL_COMMAND"\n'
    for name, text in (("enter", _ENTER), ("serve", _SERVE), ("forward", forward), ("sshd_config", _SSHD_CONFIG)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
