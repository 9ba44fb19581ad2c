"""Writing a small file whole: secrets above all, and what another process may read at any moment.

It imports next to nothing, for the git host's logins.
"""

import os
from pathlib import Path


def write(file: Path, text: str, mode: int = 0o600) -> Path:
    """Put a file that holds `text` in the place of `file` at once, and return its path.

    From its first byte on nobody reads it whom `mode` (whatever the umask) does not let; that is its owner alone, when
    not told. Whoever reads meanwhile finds the old text or the new one; a link is replaced, not followed.
    """
    fresh = file.with_name(f".{file.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as sink:
            os.fchmod(sink.fileno(), mode)
            sink.write(text)
        fresh.replace(file)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return file
