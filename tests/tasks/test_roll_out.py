"""How a host is reverted: on a real repo and ledger, without Prefect."""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
from prefect.logging import disable_run_logger

from tasks import roll_out
from tasks.reversal import Reversal
from tests.ledger.test_ledger import WEB1, intent
from tests.repos import InfraRepo
from toto.infra_repo.manifest import Machine, Manifest
from toto.infra_repo.settings import RollOut, Sandbox, Settings
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.machine.activation import Activator
from toto.machine.ssh import Unreachable


@pytest.fixture(autouse=True)
def outside_of_runs() -> Iterator[None]:
    with disable_run_logger():
        yield


@pytest.mark.parametrize(("access", "tries"), [("sudo", 1), ("locked", 2)])
async def test_a_revert_waits_for_as_long_as_a_machine_waits_for_toto(
    access: Literal["sudo", "locked"], tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By document it waits until toto's tests are over."""
    infra = InfraRepo(tmp_path)
    commit = infra.commit({"tests/web1/smoke/front": "#!/bin/sh\n", "tests/web1/post-switch/front": "#!/bin/sh\n"})
    opened = intent("run-1")
    opened = opened.model_copy(update={"desired": opened.desired.model_copy(update={"commit": commit})})
    await Ledger(infra.bare).write(WEB1, steps.intend(opened), "intend")
    tried = 0

    @asynccontextmanager
    async def connect(*_: object) -> AsyncIterator[Activator]:
        nonlocal tried
        tried += 1
        raise Unreachable("it is away", target="web1")
        yield

    monkeypatch.setattr(roll_out, "connect", connect)
    machine = Machine(name="web1", address="192.0.2.1", access=access)
    settings = Settings(roll_out=RollOut(confirm_timeout=1.0), sandbox=Sandbox(test_timeout=4.0))
    manifest = Manifest(machines={"web1": machine})
    with pytest.raises(Unreachable):
        await roll_out.revert(Reversal(infra.bare, "run-1", WEB1, manifest, settings, "a test", time.time() - 3.5))
    assert tried == tries
