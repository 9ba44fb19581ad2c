"""Measures finding modules in `.tf` files: one large file, compared with eight of an eighth. Linear is a ratio of 1."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from bench.row import Row
from toto.terraform import hcl

ROUNDS: Final = 3
TIMES: Final = 8
ORDINARY: Final = '''\
resource "aws_instance" "web" {
  ami  = "ami-${var.images["web"]}" # the newest
  tags = { Name = "web", "a b" = <<-EOT
    hello ${var.name}
  EOT
  }
}
module "network" {
  source = "../modules/network"
  zones  = [1, 2, 3, "x"]
}
'''
# Openings that are never closed, one after the other: a search that starts at each would read everything that follows.
OPEN: Final = ("<<A\n", "<<A ", "<<a", "/*", '"${', "{", '"\\', '${"', '"', "#", "module a {source=", "<")


async def measure(_: Path) -> AsyncIterator[Row]:
    """Ordinary text, and text that only has openings."""
    for what, size, pieces in (("800 kB of .tf, its modules", 800_000, (ORDINARY,)),
                               (f"{len(OPEN)} × 200 kB of openings in .tf", 200_000, OPEN)):
        large, small = [], []
        for _round in range(ROUNDS):
            large.append(sum(_seconds(piece, size) for piece in pieces))
            small.append(sum(_seconds(piece, size // TIMES) for piece in pieces for _ in range(TIMES)))
        yield Row(what, large, f"{TIMES} × {size // TIMES // 1000} kB of it", small)


def _seconds(piece: str, size: int) -> float:
    text = piece * (size // len(piece))
    began = time.perf_counter()
    for _ in hcl.modules(text):
        pass
    return time.perf_counter() - began
