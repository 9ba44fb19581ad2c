"""What is the same on all machines that do what signed documents say, whichever way they get them."""

import abc
from typing import Final

from toto.base.errors import TotoError
from toto.machine import activation
from toto.machine.activation import MachineState, Verb
from toto.machine.condition import Condition
from toto.machine.ssh import Unreachable

# What a refusal of the machine's helper calls for, by its kind.
HINTS: Final = {
    "NotGenuine": "its services.flying-monkey.signers must name toto's signer: see `toto machine setup`",
    "Lost": "look at /var/lib/flying-monkey on the machine",
}


class NotBack(Unreachable):
    """A machine that was to reboot is not heard of any more."""

    def __init__(self, seconds: float, *, target: str) -> None:
        self.words = f"has not come back from its reboot within {seconds:.0f} s"
        TotoError.__init__(
            self, self.words, target=target, hint="look at its console: the system before is in its boot menu"
        )


class ByDocument(abc.ABC):
    """A part of an `Activator`: what follows from the machine's facts, and from having it go back."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The machine's name."""

    @abc.abstractmethod
    async def facts(self, *, fresh: bool = False) -> MachineState:
        """What the machine runs, and what it boots next."""

    @abc.abstractmethod
    async def condition(self) -> Condition:
        """How the machine says that it is."""

    @property
    @abc.abstractmethod
    def ends_with(self) -> Verb:
        """What a roll-out ends with on it."""

    @abc.abstractmethod
    async def _back(self, verb: Verb, path: str, finish: float) -> None:
        """Have it go back to `path`, by a document that ends with `verb`."""

    async def prepare(self) -> None:  # noqa: B027
        """Nothing: what obeys is the machine's own."""

    async def may_lack(self, path: str) -> bool:
        """Unless it runs that."""
        return (await self.facts()).system != path

    async def try_way_in(self, path: str, running: str, *, address: bool) -> None:  # noqa: B027
        """Nothing: who has no root there cannot try it; the watchdog is what is left."""

    async def interrupt(self, run: str, *, patience: float) -> None:  # noqa: B027
        """Nothing: to go back is obeyed at any time, and by a machine that is away when it returns."""

    async def check(self, path: str, *, profile: bool = False, running: bool = True, fresh: bool = False) -> None:
        """Check that the machine runs `path`; with `profile`, that it boots it next. `fresh` is as in `facts`."""
        activation.compare(await self.facts(fresh=fresh), path, profile=profile, running=running, target=self.name)

    async def revert(self, to: MachineState, *, finish: float, boot: bool) -> None:
        """Have the machine go back to `to`, also when it has gone back by itself: its boot default may be half done.

        What a roll-out does not touch is left alone. A machine that does not answer is told all the same, if it can be.
        """
        try:
            facts = await self.facts()
        except Unreachable:
            facts = None
        if facts is None:
            runs, boots = self.ends_with != "boot", self.ends_with != "test"
        else:
            runs, boots = facts.system != to.system, facts.profile != to.profile
        boots = bool(to.profile) and (boots or (boot and self.ends_with != "test"))
        if to.profile == to.system and self.ends_with == "switch":
            await self._back("switch", to.system, finish)
        else:
            if runs:
                await self._back("test", to.system, finish)
            if boots:
                await self._back("boot", to.profile, finish)
        await self.check(to.system)
        if to.profile:
            await self.check(to.profile, profile=True, running=False)
