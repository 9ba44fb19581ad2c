"""Mounts the store paths of a closure, then becomes the next program.

    python -I -S toto/cell/mounts.py FOLDER PATH... -- COMMAND...

It runs in a mount namespace of its own, made by `toto.cell.cell`. Each path is mounted in FOLDER under its own name; a
path that is a link is made anew. A loop of mount(2) takes 20 microseconds a path; bwrap's own mounts are quadratic.
"""

import ctypes
import os
import sys

_BIND = 4096

folder, *words = sys.argv[1:]
end = words.index("--")
libc = ctypes.CDLL(None, use_errno=True)
for path in words[:end]:
    place = os.path.join(folder, os.path.basename(path))  # noqa: PTH118, PTH119
    if os.path.islink(path):  # noqa: PTH114
        os.symlink(os.readlink(path), place)  # noqa: PTH115, PTH211
        continue
    if os.path.isdir(path):  # noqa: PTH112
        os.mkdir(place)  # noqa: PTH102
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o444))
    if libc.mount(path.encode(), place.encode(), None, _BIND, None) != 0:
        sys.exit(f"cell: {path} cannot be mounted: {os.strerror(ctypes.get_errno())}")
os.execv(words[end + 1], words[end + 1 :])  # noqa: S606
