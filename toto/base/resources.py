"""How much memory this machine has free, and how many things may run side by side in it."""

import os
from pathlib import Path


def memory_available() -> int:
    """The megabytes that processes could still use, by the kernel's estimate (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 1024


def at_once(memory_each: int) -> int:
    """How many things of `memory_each` megabytes may run side by side, by free memory and cores; at least 1."""
    return max(1, min(os.cpu_count() or 1, memory_available() // max(1, memory_each)))
