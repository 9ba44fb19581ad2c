"""Random sequences of what runs, and others, do to a terraform root; beside it a model of what must be left of it.

A round deploys a random configuration to a root of volumes (`tests.terraform_provider`): some are created, changed,
replaced, destroyed, moved, imported, forgotten. The run may fail in the middle, or after it; meanwhile somebody else
may apply something, or take something out of the state. Then toto goes back. What must hold:

- No volume is gone that was there when the run failed, unless the run had created it.
- If toto says that it went back, then each address has the volume of before, with the content of before, and no other
  volume is left; or the words that toto says name the address.
- If toto says that it cannot go back, nothing was touched, and somebody else is the reason.

`make torture` drives 500, `python -m tests.terraform.sequences --sequences 20 --seed 3` as many as you like.
"""

import argparse
import asyncio
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests import terraform_provider
from toto.base import paths
from toto.infra_repo.settings import Terraform
from toto.terraform.plan import Action, Deed, Planned
from toto.terraform.revert import CannotGoBack, apply_back, plan_back, seen, way_back
from toto.terraform.session import ApplyFailed, Root, Session, TerraformFailed

HEAD = f'terraform {{\n  required_providers {{\n    demo = {{ source = "{terraform_provider.SOURCE}" }}\n  }}\n}}\n'
POOLS = ("/state", "/state/other")
COMMIT = "0123456789abcdef"


@dataclass
class Wanted:
    """A configuration: each volume's pool and content by its address, and the blocks besides."""

    volumes: dict[str, tuple[str, str]] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)

    def text(self) -> str:
        made = [
            f'resource "demo_volume" "{name}" {{\n  pool = {json.dumps(pool)}\n  content = {json.dumps(content)}\n}}\n'
            for name, (pool, content) in self.volumes.items()
        ]
        return "".join([HEAD, *made, *self.blocks])


class Wrong(AssertionError):
    """Something must hold and does not."""


class World:
    """A root, the volumes in the world, and the dice."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.folder, self.dice = folder, dice
        self.repo = folder / "infra.git"
        self.home = paths.repo_state(self.repo) / "terraform" / "main"
        (self.home / "other").mkdir(parents=True)
        self.good = Wanted()
        self.number = 0

    def new(self, what: str) -> str:
        self.number += 1
        return f"{what}{self.number}"

    def volumes(self) -> dict[str, str]:
        """What every volume in the world holds, by its id."""
        found = [each for pool in POOLS for each in self._at(pool).iterdir() if each.is_file() and "-" in each.name]
        return {self._id(each): each.read_text() for each in found if not each.name.startswith("errored")}

    def _at(self, pool: str) -> Path:
        return self.home / Path(pool).relative_to("/state")

    def _id(self, file: Path) -> str:
        return str(Path("/state") / file.relative_to(self.home))

    def session(self, wanted: Wanted) -> Session:
        tree = self.folder / self.new("tree")
        (tree / "terraform").mkdir(parents=True)
        (tree / "terraform/main.tf").write_text(wanted.text())
        return Session(self.repo, Root(name="main", path="terraform"), tree, self.folder / "run", Terraform())

    async def applied(self, wanted: Wanted) -> None:
        session = self.session(wanted)
        planned = await session.plan()
        if not planned.empty:
            await session.apply(planned)

    async def round(self) -> str:
        """One run of a random configuration, and the way back; what came of it. Raises `Wrong`."""
        dice = self.dice
        wanted, did = self._mutated()
        fails = dice.choice(["in it", "in it", "after it", "after it", "after it", "never"])
        if fails == "in it":
            last = dice.choice([*wanted.volumes, None])
            after = f"  depends_on = [demo_volume.{last}]\n" if last and dice.random() < 0.7 else ""
            wanted.blocks.append(
                f'resource "demo_file" "bad" {{\n  path = "/state/bad"\n  content = "fail"\n{after}}}\n'
            )
        session = self.session(wanted)
        planned, before = await session.plan(), self.volumes()
        deeds, partial = planned.deeds, ""
        try:
            state = planned.before if planned.empty else await session.apply(planned)
        except ApplyFailed:
            state, partial = await session.state(), "partly "
        if fails == "never":
            self.good = Wanted(wanted.volumes, wanted.blocks)  # people leave such blocks where they are
            return f"{did}: good"
        deeds = seen(deeds, state) if dice.random() < 0.9 else deeds  # (or toto died before it saw that)
        others = await self._others(wanted, dict(state.ids))
        there = self.volumes()
        made = {state.ids.get(each.address, "") for each in deeds if each.action in (Action.CREATE, Action.REPLACE)}
        made -= before.keys()
        told = await self._back(planned, deeds, made, before, there, bool(others))
        return f"{did}: {partial}applied, failed {fails}{others}; {told}"

    def _mutated(self) -> tuple[Wanted, str]:
        """A random configuration, and what it does."""
        dice, wanted, did = self.dice, Wanted(dict(self.good.volumes)), Counter[str]()
        for name in list(wanted.volumes):
            pool, content = wanted.volumes[name]
            address = f"demo_volume.{name}"
            match dice.choice(["keep", "keep", "change", "replace", "destroy", "move", "move", "forget"]):
                case "change":
                    wanted.volumes[name] = (pool, self.new("content"))
                case "replace":
                    wanted.volumes[name] = (POOLS[POOLS.index(pool) - 1], content)
                case "destroy":
                    del wanted.volumes[name]
                case "move":
                    del wanted.volumes[name]
                    to = self.new("moved")
                    wanted.volumes[to] = (pool, content if dice.random() < 0.7 else self.new("content"))
                    wanted.blocks.append(f"moved {{\n  from = {address}\n  to = demo_volume.{to}\n}}\n")
                case "forget":
                    del wanted.volumes[name]
                    wanted.blocks.append(
                        f"removed {{\n  from = {address}\n  lifecycle {{\n    destroy = false\n  }}\n}}\n"
                    )
                case _:
                    continue
            did["touched"] += 1
        for _ in range(dice.randrange(3)):
            wanted.volumes[self.new("created")] = (dice.choice(POOLS), self.new("content"))
            did["created"] += 1
        if dice.random() < 0.5:
            name, pool, content = self.new("imported"), dice.choice(POOLS), self.new("content")
            file = self._at(pool) / f"by-hand-{name}"
            file.write_text(content)
            wanted.volumes[name] = (pool, content if dice.random() < 0.8 else self.new("content"))
            wanted.blocks.append(f'import {{\n  to = demo_volume.{name}\n  id = "{self._id(file)}"\n}}\n')
            did["imported"] += 1
        return wanted, ", ".join(f"{count} {what}" for what, count in did.items()) or "nothing"

    async def _others(self, wanted: Wanted, ids: dict[str, str]) -> str:
        """What somebody else does meanwhile, in words; "" for nothing."""
        dice = self.dice
        theirs = Wanted(dict(wanted.volumes))
        match dice.choice(["", "", "", "applies", "destroys", "changes", "forgets"]):
            case "applies":
                theirs.volumes[self.new("theirs")] = (dice.choice(POOLS), self.new("content"))
            case "destroys" if theirs.volumes:
                del theirs.volumes[dice.choice(list(theirs.volumes))]
            case "changes" if theirs.volumes:
                name = dice.choice(list(theirs.volumes))
                theirs.volumes[name] = (theirs.volumes[name][0], self.new("content"))
            case "forgets" if ids:
                session = self.session(wanted)
                await session.init()
                await session.forget([dice.choice(list(ids))])
                return ", another forgets"
            case _:
                return ""
        # What is imported must be configured, and what fails is not theirs.
        theirs.blocks = [each for each in wanted.blocks if not each.startswith("import") and '"demo_file"' not in each]
        await self.applied(theirs)
        return ", another applies"

    async def _back(
        self,
        planned: Planned,
        deeds: tuple[Deed, ...],
        made: set[str],
        before: dict[str, str],
        there: dict[str, str],
        others: bool,
    ) -> str:
        session = self.session(self.good)
        await session.init()
        now = await session.state()
        try:
            way = way_back(COMMIT, planned.before, deeds, now, target="terraform/main")
            assert way is not None
            back = await plan_back(session, way)
            if wrong := way.wrong(back):
                raise CannotGoBack("; ".join(wrong), target="terraform/main")
        except (CannotGoBack, TerraformFailed) as error:
            self._must(self.volumes() == there and (await session.state()) == now, "it touched something")
            self._must(others, f"nobody else did anything, and it cannot go back: {error}")
            self.good = Wanted()  # a person puts it right
            for name, id in now.ids.items():
                if (file := self.home / Path(id).relative_to("/state")).exists() and name.startswith("demo_volume."):
                    self.good.volumes[name.partition(".")[2]] = (str(Path(id).parent), file.read_text())
            await self.applied(self.good)
            return "cannot go back"
        state = await apply_back(session, way, back)
        words = way.words(back)
        self._hold(planned.before.ids, state.ids, before, there, words, made)
        self.good = Wanted(
            {name: each for name, each in self.good.volumes.items() if f"demo_volume.{name}" in state.ids},
            self.good.blocks,
        )
        return "is back"

    def _hold(
        self,
        old: Mapping[str, str],
        new: Mapping[str, str],
        before: dict[str, str],
        there: dict[str, str],
        words: str,
        made: set[str],
    ) -> None:
        """Raises `Wrong` when something that must hold after a way back does not."""
        after = self.volumes()
        if gone := there.keys() - after.keys() - made:
            raise Wrong(f"gone, although the run did not create it: {sorted(gone)}; {words}")
        named = set(re.findall(r"demo_volume\.\w+", words))
        for address in old.keys() | new.keys():
            same = old.get(address) == new.get(address) and before.get(old.get(address, "")) == after.get(
                new.get(address, "")
            )
            self._must(same or address in named, f"{address} is not what it was, and nobody says so: {words}")
        unknown = after.keys() - before.keys() - set(new.values())
        self._must(len(unknown) <= len(named), f"left behind, and nobody says so: {sorted(unknown)}; {words}")

    def _must(self, holds: bool, what: str) -> None:
        if not holds:
            raise Wrong(what)


async def sequences(folder: Path, count: int, seed: int, rounds: int = 5, beside: int = 2) -> Counter[str]:
    """Run so many sequences, a new root for each few `rounds`; how often each end came.

    So many roots are at work `beside` each other. Raises `Wrong`, with how to repeat it.
    """
    ends: Counter[str] = Counter()
    room = asyncio.Semaphore(beside)

    async def of_one_root(first: int) -> None:
        async with room:
            dice = random.Random(f"{seed} {first}")
            world = World(folder / str(first), dice)
            world.good = Wanted({world.new("v"): ("/state", world.new("content")) for _ in range(4)})
            await world.applied(world.good)
            for number in range(first, min(first + rounds, count)):
                began = time.monotonic()
                try:
                    told = await world.round()
                except Exception as error:
                    raise Wrong(f"sequence {number + 1} of `--sequences {count} --seed {seed}`: {error}") from error
                ends[told.rpartition("; ")[2].rpartition(": ")[2]] += 1
                print(f"{number + 1:3} {time.monotonic() - began:4.1f} s  {told}", flush=True)

    async with asyncio.TaskGroup() as roots:
        for first in range(0, count, rounds):
            roots.create_task(of_one_root(first))
    return ends


async def _main(count: int, seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="toto-sequences-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        configuration = terraform_provider.install(folder / "provider")
        os.environ |= {
            "TOTO_STATE": str(folder / "state"),
            "TF_CLI_CONFIG_FILE": str(configuration),
            "TOTO_CELL_READ": ":".join(map(str, terraform_provider.needs(configuration))),
        }
        ends = await sequences(folder / "roots", count, seed)
    print(f"{count} sequences, seed {seed}: {', '.join(f'{n} {what}' for what, n in ends.items())}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    arguments = parser.parse_args()
    asyncio.run(_main(arguments.sequences, arguments.seed))
