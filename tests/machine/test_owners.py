"""Which repo may deploy which machine: the first one, until it gives the machine up."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ledger.test_ledger import deployed, intent
from tests.repos import InfraRepo, git
from toto import cli
from toto.base import paths
from toto.base.errors import InputError, TotoError
from toto.cell.namespace import own_addresses
from toto.infra_repo.manifest import SSH, Machine, Manifest, ManifestError
from toto.ledger import steps
from toto.ledger.ledger import Ledger
from toto.ledger.target import Target
from toto.machine import owners
from toto.machine.owners import NotOwned
from toto.machine.ssh import SshTarget, Unreachable

KEY, OTHER = "ssh-ed25519 AAAA", "ssh-ed25519 BBBB"


@pytest.fixture(autouse=True)
def repos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("TOTO_STATE", str(tmp_path / "state"))
    for name in ("infra", "lab"):
        git("init", "--quiet", "--bare", f"{name}.git", cwd=tmp_path)
    return tmp_path / "infra.git", tmp_path / "lab.git"


def machine(name: str = "web1", address: str = "10.0.0.1", port: int = 22) -> Machine:
    return Machine(name=name, address=address, ssh=SSH(port=port))


@pytest.mark.parametrize(
    ("theirs", "key", "refused"),
    [
        (machine(), KEY, "belongs to the repository infra"),
        (machine(address="10.9.9.9"), OTHER, "belongs to the repository infra"),  # the name
        (machine("front"), OTHER, "its address 10.0.0.1, that of web1, belongs to"),
        (machine("front", "web1.lan"), KEY, "its host key, that of web1, belongs to"),
        (machine("front", port=2222), OTHER, ""),
        (machine("front", "10.0.0.2"), OTHER, ""),
    ],
)
async def test_what_a_machine_is_known_by_belongs_to_the_first(
    repos: tuple[Path, Path], theirs: Machine, key: str, refused: str
) -> None:
    infra, lab = repos
    await owners.claim(infra, machine(), [KEY])
    await owners.claim(infra, theirs, [key])  # the same repo may do as it likes
    await owners.release(infra, theirs.name)
    await owners.claim(infra, machine(), [KEY])
    if not refused:
        await owners.claim(lab, theirs, [key])
        return
    with pytest.raises(NotOwned, match=refused) as error:
        await owners.claim(lab, theirs, [key])
    assert "next: if it is to move, on toto: toto machine move web1 infra lab" in str(error.value)
    assert owners.read().machines["web1"].repo == infra


async def test_of_two_repos_at_once_one_gets_the_machine(repos: tuple[Path, Path]) -> None:
    results = await asyncio.gather(
        *(owners.claim(repos[number % 2], machine(), [KEY]) for number in range(8)), return_exceptions=True
    )
    assert sum(isinstance(each, NotOwned) for each in results) == 4


async def test_a_machine_is_moved_retired_and_listed(
    repos: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    infra, lab = repos

    def toto(*words: str) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", ["toto", "machine", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    await owners.claim(infra, machine(), [KEY])
    where = ("--repos", str(infra.parent))
    for words, complaint in (
        (("web1", "lab", "infra"), "does not belong to lab: it belongs to infra"),
        (("web2", "infra", "lab"), "does not belong to infra: nobody has deployed it"),
        (("web1", "infra", "none"), "there is no such repository"),
        (("web1", "infra", "../x"), "does not name a repository"),
    ):
        status, said = await asyncio.to_thread(toto, "move", *words, *where)
        assert status == 2 and complaint in said, said
    web1 = Target("host", "web1")
    await Ledger(infra).write(web1, steps.intend(intent("run-1")), "intent")
    status, said = await asyncio.to_thread(toto, "move", "web1", "infra", "lab", *where)
    assert status == 2 and "infra is deploying it, or has left it half done" in said
    await Ledger(infra).write(web1, lambda _: None, "retired")
    await owners.move("web1", infra, lab)
    with pytest.raises(NotOwned, match="belongs to the repository lab"):
        owners.check(infra, machine())
    assert "lab" in (await asyncio.to_thread(toto, "list"))[1]
    await owners.release(infra, "web1")
    assert "web1" in owners.read().machines
    await owners.release(lab, "web1")
    await owners.claim(infra, machine(), [OTHER])
    with pytest.raises(InputError):
        await owners.move("web1", lab, infra)


async def test_the_ledgers_of_an_older_toto_say_who_owns_what_and_the_last_one_counts(tmp_path: Path) -> None:
    manifest = "machines:\n  web1: {address: 10.0.0.1}\n  %s: {address: %s}\n"
    infra, lab = InfraRepo(tmp_path / "a"), InfraRepo(tmp_path / "b")
    for each, name, address, at in (
        (infra, "web2", "10.0.0.2", "2026-01-01T00:00:00Z"),
        (lab, "db1", "10.0.0.2", "2026-02-01T00:00:00Z"),
    ):
        commit = each.commit({"machines.yaml": manifest % (name, address)})
        for host in ("web1", name):
            good = deployed("drv").model_copy(update={"commit": commit, "at": at})
            await Ledger(each.bare).write(Target("host", host), steps.verified(good), "good")
    (paths.repo_state(lab.bare) / "known_hosts").write_text(f"web1 {OTHER}\ndb1 {KEY}\n")
    bares = [infra.bare, lab.bare]
    said = await owners.adopt(bares)
    assert len(said) == 2 and all("toto machine move" in each for each in said), said
    found = owners.read()
    assert {name: owner.repo for name, owner in found.machines.items()} == {"web1": lab.bare, "db1": lab.bare}
    assert found.machines["db1"].host_keys == (KEY,)
    assert await owners.adopt(bares) == [] and owners.read() == found


async def test_a_file_that_cannot_be_read_lets_nobody_deploy(repos: tuple[Path, Path]) -> None:
    (paths.state_home() / owners.FILE).write_text("{")
    with pytest.raises(TotoError, match=r"machines\.json: cannot be read"):
        await owners.claim(repos[0], machine(), [KEY])


def test_host_keys_are_the_manifests_or_those_that_were_seen(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    target = SshTarget("web1", "10.0.0.1", known_hosts=known)
    assert owners.host_keys(target) == []
    known.write_text(f"web1 {KEY} comment\nweb2 {OTHER}\n")
    assert owners.host_keys(target) == [KEY]
    assert owners.host_keys(replace(target, host_key=f"{OTHER} me")) == [OTHER]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.1.2.3", "localhost", "127.1", "2130706433", "0x7f000001", "0", "0.0.0.0", "::1", "::"),
        *("::ffff:127.0.0.1", "169.254.169.254", "fe80::1", *own_addresses()[:1]),
    ],
)
async def test_only_the_repo_with_the_shared_blocks_deploys_the_machine_of_toto(
    repos: tuple[Path, Path], address: str
) -> None:
    infra, lab = repos
    paths.state_home().mkdir(exist_ok=True)
    (paths.state_home() / "server.toml").write_text('shared_blocks = "infra"\n')
    with pytest.raises(NotOwned, match="lab must not deploy it"):
        await owners.located(lab, machine(address=address), 1)
    assert await owners.located(infra, machine(address=address), 1)


async def test_a_machine_is_looked_up_once(repos: tuple[Path, Path]) -> None:
    _, lab = repos
    assert await owners.located(lab, machine(address="198.51.100.7"), 1) == "198.51.100.7"
    with pytest.raises(Unreachable, match=r"nowhere\.invalid has no address"):
        await owners.located(lab, machine(address="nowhere.invalid"), 1)
    target = SshTarget("web1", "web1.example.org", ip="198.51.100.7", throwaway=True)
    assert "HostName 198.51.100.7\n" in target.write_config(lab / "ssh").read_text()


def fleet(*machines: Machine) -> Manifest:
    return Manifest(machines={each.name: each for each in machines})


async def test_two_names_that_lead_to_one_machine_are_refused() -> None:
    """`localhost` is 127.0.0.1 (and perhaps ::1) wherever tests run."""
    here = machine("web1", "127.0.0.1", 2222)
    with pytest.raises(ManifestError, match=r"web2: address: localhost, port 2222, leads to web1: one machine"):
        await owners.check_distinct(fleet(here, machine("web2", "localhost", 2222)))
    with pytest.raises(ManifestError, match=r"web2: address: localhost, port 2222, leads to web1: one machine"):
        await owners.check_distinct(
            fleet(machine("web1", "::ffff:127.0.0.1", 2222), machine("web2", "localhost", 2222))
        )
    away = machine("web2", "localhost", 2222).model_copy(update={"deploy": "none"})
    for other in (machine("web2", "localhost", 2223), machine("web2", "web2.invalid", 2222), away):
        await owners.check_distinct(fleet(here, other))


async def test_a_machine_of_a_different_repo_is_known_by_the_address_that_its_name_leads_to(
    repos: tuple[Path, Path],
) -> None:
    infra, lab = repos
    await owners.claim(infra, machine("web1", "web1.lan"), [KEY], "10.0.0.1")
    for theirs, ip in ((machine("front", "front.lan"), "10.0.0.1"), (machine("front", "10.0.0.1"), "10.0.0.1")):
        with pytest.raises(NotOwned, match=r"its address .*, that of web1, belongs to the repository infra"):
            await owners.claim(lab, theirs, [OTHER], ip)
    await owners.claim(lab, machine("front", "front.lan", 2222), [OTHER], "10.0.0.1")
    with pytest.raises(NotOwned, match=r"that of web1"):
        owners.check(lab, machine("front", "WEB1.lan."))
    await owners.claim(infra, machine("web2", "fd00::2"), [KEY])
    with pytest.raises(NotOwned, match=r"that of web2"):
        owners.check(lab, machine("front", "fd00:0:0::2"))
    assert await owners.moved(infra, machine("web2", "FD00::0:2"), owners.read()) == ""


@pytest.mark.parametrize(
    ("now", "was", "says"),
    [
        (machine(), None, ""),
        (machine(address="10.0.0.2"), None, "refused"),
        (machine(address="10.0.0.2"), "10.0.0.3", "refused"),
        (machine(address="10.0.0.2"), "10.0.0.1", "10.0.0.1"),
        (machine(port=2222), None, "refused"),
        (machine(port=2222), "10.0.0.1:22", "10.0.0.1:22"),
        (machine(port=2222), "10.0.0.1", "10.0.0.1:22"),
        (machine("web2", "10.0.0.2"), None, ""),
    ],
)
async def test_a_deployed_machine_gets_a_new_address_by_an_explicit_word(
    repos: tuple[Path, Path], now: Machine, was: str | None, says: str
) -> None:
    infra, lab = repos
    await owners.claim(infra, machine(), [KEY])
    now = now.model_copy(update={"was": was})
    if says == "refused":
        with pytest.raises(InputError, match=r"is deployed at 10\.0\.0\.1.*, and machines\.yaml says") as error:
            await owners.moved(infra, now, owners.read())
        assert "write `was: 10.0.0.1" in str(error.value) and "stays as it is" in str(error.value)
    else:
        assert await owners.moved(infra, now, owners.read()) == says
    assert await owners.moved(lab, now, owners.read()) == "", "(it is not theirs: that is refused elsewhere)"
    if says and says != "refused":
        await owners.claim(infra, now, [KEY])
        assert await owners.moved(infra, now, owners.read()) == "", "the word may stay"


async def test_a_name_for_the_address_of_a_deployed_machine_is_no_move(repos: tuple[Path, Path]) -> None:
    await owners.claim(repos[0], machine("web1", "127.0.0.1"), [KEY], "127.0.0.1")
    assert await owners.moved(repos[0], machine("web1", "localhost"), owners.read()) == ""
    await owners.claim(repos[0], machine("web1", "localhost"), [KEY], "127.0.0.1")
    assert await owners.moved(repos[0], machine("web1", "127.0.0.1"), owners.read()) == ""
