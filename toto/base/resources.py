"""How much of this machine is free, and how many things of a kind may run side by side by that."""

import os
from pathlib import Path


def memory_available() -> int:
    """Megabytes that processes could still take, as the kernel estimates."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 1024


def at_once(memory_each: int) -> int:
    """How many things of that many megabytes may run side by side: by memory and cores, at least one."""
    return max(1, min(os.cpu_count() or 1, memory_available() // max(1, memory_each)))
