"""Checks run in their cell against a real sshd: what they find, and what they cannot reach.

pytest-testinfra is the real one. InSpec is a program on PATH that asks the machine for something over ssh, as InSpec
does, and then reports what the real one was recorded to report; where a real inspec or cinc-auditor is on PATH, it runs
too.
"""

import os
import shutil
import warnings
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from tests.compliance.test_inspec import RECORDED
from tests.machine.test_ssh import Server, needs_sshd, sshd
from toto.compliance.checks import find
from toto.compliance.results import ITSELF, MOST, Control, Outcome, junit_xml, summary
from toto.compliance.run import Bench, run_checks
from toto.infra_repo.settings import Compliance
from toto.machine.ssh import plain
from toto.rehearsal.phase_run import Endpoint, bench
from toto.rehearsal.suite import Phase

pytestmark = needs_sshd

MODULE = '''
import pytest
from helper import NAME

@pytest.mark.impact(0.9)
def test_the_machine_is_there(host):
    """The machine has a kernel of its own.
    More words."""
    assert host.run("cat %s", NAME).stdout == "it's here\\n"

@pytest.mark.parametrize("path", ["/nowhere", "/etc/passwd"])
@pytest.mark.impact(0.7)
def test_a_file(host, path):
    assert host.file(path).exists

def test_with_what_is_not_known_here(host):
    raise NotImplementedError

@pytest.mark.skip(reason="later")
@pytest.mark.impact(1.0)
def test_that_is_skipped(host):
    pass

@pytest.mark.xfail(reason="ticket 7")
def test_that_is_waived(host):
    assert host.user("root").uid == 1

@pytest.mark.xfail(reason="ticket 8")
def test_that_is_waived_and_passes(host):
    assert host.user("root").uid == 0

def test_that_is_wrong(host):
    host.nothing_of_this_name

@pytest.fixture
def broken():
    raise ValueError("no such thing")

def test_whose_fixture_is_wrong(host, broken):
    pass
'''


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    (tmp_path / "machine").mkdir()
    async with sshd(tmp_path / "machine") as made:
        yield made


async def checked(
    tmp_path: Path, server: Server, files: Mapping[str, str], settings: str = "{}", timeout: float = 120
) -> dict[str, Control]:
    """The controls by name, once the checks of a commit with these files have run."""
    tree, scratch = tmp_path / "tree", tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    its = Compliance.model_validate_json(settings)
    endpoint = Endpoint(plain(server.target, tmp_path / "ssh-files"), {})
    async with bench(endpoint, "web1", Phase.POST_SWITCH, tree, scratch) as place:
        made = Bench("web1", place.cell, place.env, tree, scratch, timeout)
        found = await run_checks(find(tree, its, ()), made)
    assert list(scratch.iterdir()) == []
    return {each.name: each for each in found}


async def test_modules_of_testinfra_reach_the_machine_by_on_host_and_nothing_else(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "toto:canary-in-the-environment")
    (tmp_path / "machine" / "it's here").write_text("it's here\n")
    found = await checked(
        tmp_path,
        server,
        {
            "compliance/base.py": MODULE,
            "compliance/helper.py": f'NAME = "{tmp_path}/machine/it\'s here"\n',
            "compliance/cell.py": f"""
import os, subprocess
def test_nothing_of_totos_is_here(host):
    said = subprocess.run("cat /proc/[0-9]*/environ; ls -R /infra /toto /compliance /results /opt/testinfra",
                          shell=True, capture_output=True, text=True).stdout
    assert "canary" not in said and "identity" not in said and "key" not in os.listdir("/toto")
    assert "SSH_AUTH_SOCK" not in os.environ
    assert not os.path.exists("{server.target.identity}")
""",
            "compliance/wrong.py": "def test_x(host:\n    pass\n",
            "compliance/empty.py": "",
            "compliance/conftest.py": "raise_nothing = 1\n",
            "compliance/_shared.py": "a b c\n",
            "pytest.ini": "[pytest]\naddopts = --no-such-option\n",
        },
    )
    told = {name: (each.outcome.value, each.impact) for name, each in found.items()}
    assert told == {
        "compliance/base.py: test_the_machine_is_there": ("passed", 0.9),
        "compliance/base.py: test_a_file[/nowhere]": ("failed", 0.7),
        "compliance/base.py: test_a_file[/etc/passwd]": ("passed", 0.7),
        "compliance/base.py: test_with_what_is_not_known_here": ("not checked", 0.5),
        "compliance/base.py: test_that_is_skipped": ("not checked", 1.0),
        "compliance/base.py: test_that_is_waived": ("waived", 0.5),
        "compliance/base.py: test_that_is_waived_and_passes": ("passed", 0.5),
        "compliance/base.py: test_that_is_wrong": ("error", 0.5),
        "compliance/base.py: test_whose_fixture_is_wrong": ("error", 0.5),
        "compliance/cell.py: test_nothing_of_totos_is_here": ("passed", 0.5),
        f"compliance/wrong.py: {ITSELF}": ("error", 1.0),
        f"compliance/empty.py: {ITSELF}": ("error", 1.0),
        f"compliance/helper.py: {ITSELF}": ("error", 1.0),
    }
    said = {name.partition(": ")[2]: each.message for name, each in found.items()}
    assert found["compliance/base.py: test_the_machine_is_there"].title == "The machine has a kernel of its own."
    assert "assert False" in said["test_a_file[/nowhere]"] and "/nowhere" in said["test_a_file[/nowhere]"]
    assert said["test_that_is_skipped"] == "later"
    assert said["test_that_is_waived"].startswith("expected to fail: ticket 7\n")
    assert "not expected" not in said["test_that_is_waived_and_passes"] and "ticket 8" in str(said)
    assert "nothing_of_this_name" in said["test_that_is_wrong"]
    assert "in its setup: ValueError: no such thing" in said["test_whose_fixture_is_wrong"]
    assert "SyntaxError" in found[f"compliance/wrong.py: {ITSELF}"].message
    assert "functions whose names begin with test_" in found[f"compliance/empty.py: {ITSELF}"].message
    assert found["compliance/base.py: test_that_is_skipped"].resource.startswith("compliance/base.py:")
    assert 'skipped="3"' in junit_xml("web1", list(found.values()))
    assert summary(found.values()) == "5 error, 1 failed, 2 not checked, 1 waived, 4 passed"


async def test_a_module_that_hangs_is_ended_and_what_it_found_before_stays(tmp_path: Path, server: Server) -> None:
    hangs = "import time\ndef test_a(host): pass\ndef test_b(host): host.run('sleep 1000')\ndef test_c(host): pass\n"
    found = await checked(tmp_path, server, {"compliance/hangs.py": hangs}, timeout=8)
    assert found["compliance/hangs.py: test_a"].outcome is Outcome.PASSED
    said = found[f"compliance: {ITSELF}"]
    assert said.stops and said.message == (
        "it did not end within 8 s, and was ended; see compliance.timeout in toto.toml"
    )


async def test_controls_are_chosen_by_name_and_none_by_such_a_name_is_an_error(tmp_path: Path, server: Server) -> None:
    files = {
        "compliance/a.py": "def test_a(host): pass\ndef test_b(host): assert False\n",
        "compliance/b.py": "def test_c(host): pass\n",
    }
    settings = '{"checks": {"a": {"controls": ["test_a"]}, "b": {"controls": ["test_gone"]}}}'
    found = await checked(tmp_path, server, files, settings)
    assert set(found) == {"compliance/a.py: test_a", f"compliance/b.py: {ITSELF}"}
    assert found[f"compliance/b.py: {ITSELF}"].message == "has no test test_gone; see `controls` in toto.toml"


async def test_what_a_module_says_of_itself_is_bounded_and_harms_nothing(tmp_path: Path, server: Server) -> None:
    """It may write anything in the place of its results."""
    said = """
import json, os
def test_a(host):
    with open("/results/tests", "a") as file:
        file.write('{"module": "m", "id": "\\\\ud800 \\\\u0000", "outcome": "passed", "seconds": 1e999}\\n')
        file.write('[1]\\n{"impact": "x"}\\n{"id": 1, "impact": NaN}\\n{"none": 1}\\n{"id": 1' + '0' * 9000 + '}\\n')
        file.write('[' * 90000 + '\\n')
        for number in range(3000):
            file.write(json.dumps({"module": "m", "id": number, "outcome": "passed", "message": "x" * 9000}) + "\\n")
"""
    found = await checked(tmp_path, server, {"compliance/a.py": said})
    assert len(found) == MOST and f"compliance: {ITSELF}" in found
    assert max(len(each.message) for each in found.values()) < 2100
    assert all(0 <= each.impact <= 1 and each.seconds <= 1e6 for each in found.values())
    "".join(each.model_dump_json() for each in found.values()).encode()


async def test_a_lost_connection_is_an_error_and_no_failure(tmp_path: Path, server: Server) -> None:
    files = {"compliance/a.py": "def test_a(host): assert host.run('exit 255').rc == 0\n"}
    (control,) = (await checked(tmp_path, server, files)).values()
    assert (control.outcome, "got no answer from the machine" in control.message) == (Outcome.ERROR, True)


INSPEC = r"""#!/bin/sh
# Connects as InSpec does (a key, no look at host keys, a proxy command), asks for something, and reports.
echo "$@" > /tmp/said
while [ $# -gt 0 ]; do
  case $1 in
    --key-files) key=$2 ;;
    --proxy-command) proxy=$2 ;;
    --reporter) report=${2#json:} ;;
    --target) target=${2#ssh://} ;;
  esac
  shift
done
said=$(ssh -i "$key" -o ProxyCommand="$proxy" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
  -o LogLevel=ERROR "$target" "printf '%s|' \"it's here\" '\$HOME'; exit 3")
[ "$? $said" = "3 it's here|\$HOME|" ] || { echo "the machine said: $said" >&2; exit 1; }
cat /tmp/said >&2
if [ -e /infra/report ]; then cp /infra/report "$report"; else cat /infra/stderr >&2; fi
exit $(cat /infra/status)
"""


@pytest.fixture
def pretender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "inspec").write_text(INSPEC)
    (tools / "inspec").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tools


PROFILE = {"inspec/base/inspec.yml": "name: base\n", "inspec/README.md": "", "inspec/base/waivers.yaml": "{}\n"}


@pytest.mark.parametrize(
    ("recorded", "status", "outcomes"),
    [
        ("failed.json", 100, {"ok-1": "passed", "fail-1": "failed", "skip-1": "not checked"}),
        ("skipped-only.json", 101, {"x": "not checked"}),
        ("no-control-matches.json", 0, {ITSELF: "error"}),
        ("stderr-syntax.txt", 1, {ITSELF: "error"}),
    ],
)
async def test_inspec_reaches_the_machine_through_a_server_of_nobodys(
    recorded: str, status: int, outcomes: Mapping[str, str], tmp_path: Path, server: Server, pretender: Path
) -> None:
    kind = "report" if recorded.endswith(".json") else "stderr"
    files = {**PROFILE, kind: (RECORDED / recorded).read_text(), "status": str(status)}
    found = await checked(tmp_path, server, files)
    said = {each.id: each.outcome.value for each in found.values()}
    assert {name: said[name] for name in outcomes} == outcomes, [each.message for each in found.values()]
    if recorded == "stderr-syntax.txt":
        assert "syntax error" in next(iter(found.values())).message
    assert server.logins() == 1


async def test_without_inspec_a_profile_is_an_error_that_says_what_to_install(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toto.compliance.inspec.NAMES", ())
    (control,) = (await checked(tmp_path, server, PROFILE)).values()
    assert control.stops and "neither inspec nor cinc-auditor is on toto's PATH\nnext: install" in control.message


CONTROLS = """
control 'there' do
  impact 0.9
  describe file('/etc/passwd') do
    it { should exist }
  end
end
control 'nowhere' do
  impact 1.0
  describe command("printf '%s' \\"it's here\\"") do
    its('stdout') { should eq 'elsewhere' }
  end
end
"""


async def test_a_real_inspec_reaches_the_machine_by_the_same_way(tmp_path: Path, server: Server) -> None:
    if not any(map(shutil.which, ("inspec", "cinc-auditor"))):
        warnings.warn("NOT RUN: the real InSpec; put inspec or cinc-auditor on PATH", stacklevel=1)
        pytest.skip("neither inspec nor cinc-auditor is on PATH")
    found = await checked(tmp_path, server, {**PROFILE, "inspec/base/controls/a.rb": CONTROLS})
    assert {each.id: each.outcome.value for each in found.values()} == {"there": "passed", "nowhere": "failed"}, found
