"""`toto doctor`: what toto lacks on this machine, and the line that mends it. It looks, and changes nothing."""

from typing import Final

from toto.doctor import fleet, programs, services, store, system
from toto.doctor.findings import Check

CHECKS: Final[tuple[Check, ...]] = (programs.programs, *system.CHECKS, *services.CHECKS, *fleet.CHECKS, *store.CHECKS)
