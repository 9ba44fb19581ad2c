"""The demo: a fleet of three virtual machines, and seven pushes. `make demo`, or `python -m tests.lab.demo`.

What it claims of a machine it has asked the machine itself, over ssh; of terraform, its state file; of a release, the
cluster. A claim that does not hold ends it with status 1. With KEEP set it leaves everything running until Ctrl-C.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

from tests.lab import nix_daemon, setup
from tests.lab.fleet import ADDRESSES, EXAMPLE, SEEN_BY_GUESTS, Fleet, Run, fleet
from tests.lab.kube import Cluster, cluster_or_stand_in
from tests.lab.machine import Machine
from tests.lab.parts import while_all_live
from tests.nix.test_builders import builder
from toto.base import process
from toto.base.errors import TotoError
from toto.ledger.ledger import Deployed, Ledger
from toto.plan.changes import table
from toto.server import logs

Has: TypeAlias = Callable[[str], Awaitable[bool]]
Elsewhere: TypeAlias = contextlib.AbstractAsyncContextManager[Has | None]
MORE = EXAMPLE.parent / "more"
ROOT, VALUES, TEST = "terraform/dns/main.tf", "helm/page/values.yaml", "helm/page/templates/test.yaml"
BROKEN_OUTSIDE = """#!/bin/sh
echo 1..1
echo 'not ok 1 - the payment provider answers'
echo '# curl: (6) Could not resolve host: payments.example.org'
"""
BROKEN_AFTER = """#!/bin/sh
echo 1..1
echo 'not ok 1 - the page is served to a customer'
"""


def say(text: str = "") -> None:
    print(text, flush=True)


def title(text: str) -> None:
    say(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}")


class Claim(Exception):
    """Something that the demo says did not hold."""


def claim(what: str, holds: bool) -> None:
    say(f"   {'✓' if holds else '✗'} {what}")
    if not holds:
        raise Claim(what)


async def push(whole: Fleet, message: str, files: dict[str, str | None]) -> Run:
    """Push, show that something is happening, and show the result as a table."""
    whole.commit(message, files)
    began = time.monotonic()
    run = whole.push()
    say(f"   $ git push toto main        # {message}")
    say(f"   {whole.url}/runs/flow-run/{run}")
    printed: set[str] = set()
    ending = asyncio.create_task(whole.ended(run, 400))
    try:
        while not ending.done():
            await asyncio.wait([ending], timeout=2)
            for name in await asyncio.to_thread(whole.subflows, run):
                if name not in printed:
                    printed.add(name)
                    say(f"   {time.monotonic() - began:5.0f} s  {name}")
        ended = await ending
    finally:
        ending.cancel()  # a demo that is ended asks a server that is going away no more
    systems = await whole.systems()
    rows = [
        {
            "target": name,
            "runs": Path(path).name[:60],
            "commit": entry.good.commit[:8] if (entry := whole.entry(name)).good else "never deployed",
        }
        for name, path in systems.items()
    ]
    rows += [
        {"target": target.label, "commit": entry.good.commit[:8], "runs": _runs(entry.good)}
        for target, entry in Ledger(whole.repo).read().entries.items()
        if target.kind != "host" and entry.good
    ]
    say("\n" + "\n".join(f"   {line}" for line in table(rows, ("target", "commit", "runs")).splitlines()))
    say(f"\n   {ended.state.lower()} after {time.monotonic() - began:.0f} s: {ended.message}\n")
    return ended


async def seven_pushes(whole: Fleet, cluster: Cluster, elsewhere: Elsewhere) -> None:
    """The pushes."""
    await hosts(whole, elsewhere)
    await other_kinds(whole, cluster)
    title("The history, as the ledger has it (git log refs/toto/ledger)")
    history = whole.git(
        "--git-dir", str(whole.repo), "log", "--format=   %cd  %s", "--date=format:%H:%M:%S", "-12", "refs/toto/ledger"
    )
    say(history.rstrip())


@contextlib.asynccontextmanager
async def builds_elsewhere(whole: Fleet, *, machine: bool) -> AsyncIterator[Has | None]:
    """Have toto's builds be done by a builder, `near`, for this block; what is yielded says whether it has a path.

    It is an sshd on this machine with a nix store of its own, or (`machine`) a virtual machine.
    """
    rules, listed = whole.state / "server.toml", whole.state / "nix" / "builders.json"
    if not listed.exists():
        say("   (without a builder: the nix daemon is not that of `toto serve`, which only root's is)")
        yield None
        return

    async def known(text: str) -> None:
        rules.write_text(text)
        async with asyncio.timeout(60):
            while ("near" in listed.read_text()) != bool(text):
                await asyncio.sleep(0.2)

    folder = whole.directory / "near"
    folder.mkdir()
    if machine:
        say("   starting a virtual machine that builds, near")
        key = whole.state / "keys/builders"
        async with Machine("near", folder, key, address="127.0.1.14", ports=()) as near:
            host_key = " ".join((await near.check("cat", "/etc/ssh/ssh_host_ed25519_key.pub")).split()[:2])
            lines = f'address = "{near.address}"\nport = 2222\nuser = "toto"\nhost_key = "{host_key}"\n'
            await known(f'[builders.near]\n{lines}systems = ["x86_64-linux"]\njobs = 2\n')

            async def on_machine(path: str) -> bool:
                return (await near.ssh("test", "-e", path)).status == 0

            yield on_machine
            await known("")
    else:
        say("   a builder, near: an sshd with a nix store of its own, on this machine (--builders: a virtual one)")
        async with builder(folder, "near", whole.toto("key", "builders")) as beside:
            await known(beside.settings())

            async def here(path: str) -> bool:
                return beside.has(path)

            yield here
            await known("")


def made(page: str, says: str) -> str:
    """The module of the page, which is a package now. (What is only a text, nix builds where it is.)

    It is a different one each time: what a demo of before has left in the store is not built again.
    """
    start, _, rest = page.partition("environment.etc")
    text = f"echo '<h1>{says}</h1><!-- {uuid4()} -->' > $out"
    package = f'environment.etc."www/index.html".source = pkgs.runCommand "page.html" {{ }} "{text}"'
    return f"{start}{package};" + rest.partition("'';")[2]


async def hosts(whole: Fleet, elsewhere: Elsewhere) -> None:
    """Five pushes of what machines run."""
    title("1. The first push: every host is rehearsed in a VM, then rolled out")
    before = await whole.systems()
    first = await push(whole, "the fleet", asks(whole, "gate"))
    after = await whole.systems()
    claim("the run is green", first.state == "COMPLETED")
    claim("every machine runs what was rehearsed", all(whole.runs_its_good(name, after[name]) for name in ADDRESSES))
    claim("which is not what it was installed with", all(before[name] != after[name] for name in ADDRESSES))

    title("2. A push that changes only the README: nothing is done")
    nothing = await push(whole, "say hello in the README", {"README.md": "# Hello\n"})
    claim(
        "the run is green, and had no host to rehearse", nothing.state == "COMPLETED" and not whole.subflows(nothing.id)
    )
    claim("no machine has changed", await whole.systems() == after)
    say(f"   · it took {nothing.seconds:.1f} s, evaluation of the three hosts and all")

    title("3. A change of the module that web1 and web2 share: only these two. And web2 is locked down")
    page = (whole.work / "modules/web.nix").read_text()
    say("   $ toto machine setup infra > modules/flying-monkey.nix")
    async with elsewhere as has:
        shared = await push(
            whole,
            "a different greeting, and toto may do less on web2",
            {"modules/web.nix": made(page, "Good morning from the fleet"), **locked_down(whole, "web2")},
        )
        changed = await whole.systems()
        claim("the run is green", shared.state == "COMPLETED")
        if has is not None:
            closure = await process.run(["nix-store", "--query", "--requisites", changed["web1"]])
            (built,) = (each for each in closure.lines if each.endswith("-page.html"))
            claim("what web1 serves was built by the builder: it is in its store", await has(built))
            told = [text for key, text in whole.artifacts(shared.id).items() if key.startswith("report")]
            claim("the report says who built it", any("built by near" in each for each in told))
    claim(
        "web1 and web2 run a different system, gate is as it was",
        {name for name in ADDRESSES if changed[name] != after[name]} == {"web1", "web2"},
    )
    served = await whole.machines["web1"].check("wget", "-q", "-O", "-", "http://127.0.0.1:8080/")
    claim("web1 serves the new page", "Good morning" in served)
    said = await whole.machines["web2"].ssh("id", user="toto")
    claim("on web2, toto's key opens nothing but the gate", said.status == 64 and "this user can do" in said.err)

    title("4. A change whose with-internet test fails: no machine is touched")
    refused = await push(
        whole,
        "take payments",
        {"modules/web.nix": page.replace("Hello", "Pay here"), "tests/web1/with-internet/50-payments": BROKEN_OUTSIDE},
    )
    claim("the run is red, and says which test", refused.state == "FAILED" and "payment provider" in refused.message)
    claim("no machine was touched", await whole.systems() == changed)

    title("5. A change that passes in the VM and fails on the real machine: everything is reverted")
    reverted = await push(
        whole,
        "serve customers",
        {
            "modules/web.nix": page.replace("Hello", "Welcome"),
            "tests/web1/with-internet/50-payments": None,
            "tests/web2/post-switch/50-customer": BROKEN_AFTER,
        },
    )
    claim("the run is red, and says which test", reverted.state == "FAILED" and "to a customer" in reverted.message)
    claim("web1 had been switched before web2 failed", "roll out host / web1" in whole.subflows(reverted.id))
    claim("and all machines are back at their last good", await whole.systems() == changed)
    served = await whole.machines["web1"].check("wget", "-q", "-O", "-", "http://127.0.0.1:8080/")
    claim("web1 serves the page it served before", "Good morning" in served)


def locked_down(whole: Fleet, name: str) -> dict[str, str | None]:
    """What a commit changes for a machine to do what signed documents say, and toto to have no root there."""
    manifest, host = (whole.work / "machines.yaml").read_text(), (whole.work / f"hosts/{name}.nix").read_text()
    start, _, rest = manifest.partition(f"  - name: {name}\n")
    return {
        "machines.yaml": f"{start}  - name: {name}\n    access: locked\n{rest}",
        "modules/flying-monkey.nix": whole.toto("machine", "setup", "infra"),
        f"hosts/{name}.nix": host.replace("common.nix", "machine.nix ../modules/flying-monkey.nix"),
    }


def asks(whole: Fleet, name: str) -> dict[str, str | None]:
    """What a commit has for a machine to ask toto by itself, beside being pushed to."""
    url = f"https://{SEEN_BY_GUESTS}:{whole.machines_port}"
    host = (whole.work / f"hosts/{name}.nix").read_text()
    return {
        "modules/asks.nix": whole.toto("machine", "setup", "infra", "--pull", url),
        f"hosts/{name}.nix": host.replace("common.nix", "common.nix ../modules/asks.nix"),
    }


async def by_pull(whole: Fleet, name: str) -> dict[str, str | None]:
    """What a commit changes for a machine to be pulled, and toto to have no user there."""
    manifest, host = (whole.work / "machines.yaml").read_text(), (whole.work / f"hosts/{name}.nix").read_text()
    key = " ".join((await whole.machines[name].check("cat", "/etc/ssh/ssh_host_ed25519_key.pub")).split()[:2])
    start, _, rest = manifest.partition(f"  - name: {name}\n")
    ssh = "ssh: { user: toto, port: 2222 }"
    return {
        "machines.yaml": f"{start}  - name: {name}\n    deploy: pull\n"
        + rest.replace(ssh, f'ssh: {{ port: 2222, host_key: "{key}" }}', 1),
        f"hosts/{name}.nix": host.replace("common.nix", "machine.nix").replace("open\\n", "half open\\n"),
    }


async def other_kinds(whole: Fleet, cluster: Cluster) -> None:
    """Two pushes of what is no machine; the machines stay as they are."""
    if shutil.which("terraform") is None:
        title(
            "6. and 7., a terraform root and a release beside the machines, are left out: terraform is not on PATH "
            "(no failure)"
        )
        return

    async def greeting() -> str | None:
        found = await cluster.get("/api/v1/namespaces/page/configmaps/page")
        return found and str(found["data"]["index.html"])

    def record() -> str:
        return str(whole.terraform_state("dns")["terraform_data.www"]["output"]["value"])

    title("6. A terraform root and a release, terraform before helm. And gate, which asks from now on, is pulled")
    more = {str(path.relative_to(MORE)): path.read_text() for path in MORE.glob("*/**/*") if path.is_file()}
    good: dict[str, str | None] = {
        "modules/web.nix": whole.git("show", "HEAD~2:modules/web.nix"),
        "tests/web2/post-switch/50-customer": None,
    }
    pulled = await by_pull(whole, "gate")
    both = await push(whole, "a record, a page in the cluster, and an open gate", {**more, **good, **pulled})
    claim("the run is green", both.state == "COMPLETED")
    machines = await whole.systems()
    claim("gate fetched what it runs from toto's cache, and booted that", whole.runs_its_good("gate", machines["gate"]))
    claim("terraform's state has the record", record() == "www 300 A 192.0.2.10")
    claim("the page is in the cluster", await greeting() == "Hello")

    title("7. Both change, and the release's own test fails: both are reverted, helm before terraform")
    root, values, test = (more[name] for name in (ROOT, VALUES, TEST))
    failed = await push(
        whole,
        "a different address and page",
        {
            ROOT: root.replace("192.0.2.10", "192.0.2.99"),
            VALUES: values.replace("Hello", "Welcome"),
            TEST: test.replace("  annotations:\n", "  annotations:\n    lab/fate: failed\n"),
        },
    )
    claim("the run is red, and says which test", failed.state == "FAILED" and "page-test" in failed.message)
    claim("terraform had been applied before that", "roll out root / dns" in whole.subflows(failed.id))
    claim("the record is what it was", record() == "www 300 A 192.0.2.10")
    claim("the page is what it was", await greeting() == "Hello")
    claim("no machine has changed", await whole.systems() == machines)


async def main(start_only: bool = False, builders: bool = False) -> int:
    """Exit status: 0 when all went as announced, 1 otherwise. `start_only`: no push, just all that the demo starts.

    With `builders`, the builder is a virtual machine.
    """
    keep = bool(os.environ.get("KEEP"))
    failure: str | None = None
    began = time.monotonic()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    title("Setting up: the lab's packages, a Prefect server (SQLite, loopback), a worker, three machines")
    directory = Path(tempfile.mkdtemp(prefix="demo-", dir=_state()))
    try:
        async with (
            nix_daemon.by_sudo(),
            _lab(),
            cluster_or_stand_in(directory / "kube", lambda text: say(f"   {text}")) as cluster,
            fleet(directory, kubeconfig=cluster.kubeconfig) as whole,
        ):
            say(f"   ready after {time.monotonic() - began:.0f} s; Prefect's UI is at {whole.url}")
            say(f"   the page of the fleet is at {whole.url}/fleet")
            if not start_only:
                elsewhere = builds_elsewhere(whole, machine=builders)
                pushes = partial(seven_pushes, whole, cluster, elsewhere)
                await _unless(stop, lambda: while_all_live(lambda: [*whole.parts, *cluster.programs()], pushes()))
            if not stop.is_set():
                clean_logs(whole)
            say(f"\nAll of it in {time.monotonic() - began:.0f} s.")
            if keep and not stop.is_set():
                say(
                    f"Left running: {whole.url}\nPush from {whole.work}; log in with `ssh -i {whole.key} -p 2222 "
                    "admin@127.0.1.12`. Ctrl-C ends it all."
                )
                await stop.wait()
    except Claim as error:
        failure = f"The demo does not hold: {error}"
    except TotoError as error:
        failure = f"The demo cannot go on: {error.message}"
    finally:
        if failure is not None or isinstance(sys.exception(), Exception):
            kept = _keep_logs(directory)
            said = failure or "The demo has a fault of its own:"
            say(f"\n{said.replace(str(directory), str(kept))}\nThe logs are in {kept}")
        shutil.rmtree(directory, ignore_errors=True)
    if failure is not None:
        return 1
    return 130 if stop.is_set() and not keep else 0


@contextlib.asynccontextmanager
async def _lab() -> AsyncIterator[None]:
    await asyncio.to_thread(setup.setup)
    yield


def clean_logs(whole: Fleet) -> None:
    """The last claim: nothing in the logs that nobody has looked at."""
    title("And the logs")
    files = [
        file for place in whole.log_places for file in ([place] if place.is_file() else sorted(place.glob("*.log")))
    ]
    found = [f"{file.name}: {fault}" for file in files for fault in logs.faults(file.read_text(errors="replace"))]
    for each in found[:3]:
        say(each)
    claim(f"{', '.join(file.name for file in files)}: no error, no traceback", not found)


def _keep_logs(directory: Path) -> Path:
    """Keep the logs, and only those, of a demo that has failed."""
    kept = Path(tempfile.mkdtemp(prefix="demo-logs-", dir=_state()))
    for file in directory.rglob("*.log"):
        place = kept / file.relative_to(directory)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    return kept


async def _unless(stop: asyncio.Event, work: Callable[[], Awaitable[None]]) -> None:
    """Do the work, or give it up when `stop` is set."""
    working, stopping = asyncio.ensure_future(work()), asyncio.create_task(stop.wait())
    await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait([working])
        return
    await working


def _state() -> Path:
    state = Path(os.environ.get("TOTO_STATE") or Path.home() / ".local/state/toto")
    state.mkdir(parents=True, exist_ok=True)
    return state


def _runs(good: Deployed) -> str:
    """What the ledger calls a terraform root's state, or a release's revision."""
    facts = good.model_dump()
    return f"revision {facts['revision']}" if "revision" in facts else f"serial {facts['serial']}"


if __name__ == "__main__":
    sys.exit(asyncio.run(main(start_only="--start-only" in sys.argv[1:], builders="--builders" in sys.argv[1:])))
