"""What a check finds, and how all of them are made: side by side, each within its time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from toto.base.errors import TotoError

AT_MOST: Final = 60.0  # seconds for one check

Status: TypeAlias = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. Toto does not work without what is `missing`; `mend` is what to do."""

    name: str
    status: Status
    said: str
    mend: str = ""


@dataclass(frozen=True)
class Toto:
    """Where one toto is: its state, the home of its server, and the repositories."""

    state: Path
    home: Path
    repos: Path


Check: TypeAlias = Callable[[Toto], Awaitable[Sequence[Finding]]]


async def examine(toto: Toto, checks: Iterable[Check], *, at_most: float = AT_MOST) -> list[Finding]:
    """What the checks find, in their order. One that fails, or takes over `at_most` seconds, is a finding too."""

    async def one(check: Check) -> Sequence[Finding]:
        name = check.__name__.replace("_", " ")
        try:
            async with asyncio.timeout(at_most):
                return await check(toto)
        except TimeoutError:
            return [Finding(name, "missing", f"did not answer within {at_most:g} s")]
        except TotoError as error:
            said = error.message if error.target is None else f"{error.target}: {error.message}"
            return [Finding(name, "missing", said, error.hint or "")]
        except OSError as error:
            return [Finding(name, "missing", str(error))]

    return [finding for found in await asyncio.gather(*map(one, checks)) for finding in found]


def text(findings: Sequence[Finding]) -> str:
    """The findings for people: what is wrong first, each with what to do."""
    order: Sequence[Status] = ("missing", "warning", "ok")
    width = max((len(each.name) for each in findings), default=0)
    lines = []
    for each in sorted(findings, key=lambda each: order.index(each.status)):
        lines.append(f"{each.status:<7}  {each.name:<{width}}  {each.said}".rstrip())
        lines += [f"         next: {each.mend}"] if each.mend else []
    return "\n".join(lines)
