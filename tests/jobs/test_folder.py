"""Reading a folder of jobs: what laminar's manual says is understood, and each mistake is told with its place."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from toto.base.errors import InputError
from toto.jobs import folder
from toto.jobs.conf import Schedule
from toto.jobs.folder import JobsError

Make = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes files, by their paths, into a tree."""

    def made(files: Mapping[str, str]) -> Path:
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(text.encode(errors="surrogateescape"))
        return tmp_path

    return made


LAMINAR = {
    "jobs/hello.run": "#!/bin/sh\n",
    "jobs/hello.before": "#!/bin/sh\n",
    "jobs/hello.env": 'FOO="bar"\n# a comment\nFOO=again\nno variable\nEMPTY=\n SPACE = x \n',
    "jobs/hello.conf": "# a comment\nTIMEOUT=120\nDESCRIPTION=Says hello\nCONTEXTS=my-env-*,special_context\n",
    "jobs/usage-monitor.run": "#!/bin/sh\n",
    "contexts/my-env-1.conf": "EXECUTORS=1\n",
    "contexts/my-env-1.env": "DUT_IP=192.168.3.2\n",
    "contexts/shared.conf": "JOBS=amd64-target-*,usage-monitor\n",
    "env": "EVERYWHERE=1\n",
    "before": "#!/bin/sh\n",
    "scripts/success_trigger": "#!/bin/sh\n",
    "groups.conf": "Hello Jobs=^hello\nAll=.*\n",
}


@pytest.mark.parametrize("path", ["jobs", "nested/cfg"])
def test_a_laminar_folder_is_read(make: Make, path: str) -> None:
    found = folder.read(make({f"{path}/{name}": text for name, text in LAMINAR.items()}), path)
    hello = found.job("hello")
    assert (hello.conf.timeout, hello.conf.description) == (120, "Says hello")
    assert hello.env == {"FOO": '"bar"', "EMPTY": "", " SPACE ": " x "}
    assert [each.name for each in found.contexts_of(hello)] == ["my-env-1"]
    assert [each.name for each in found.contexts_of(found.job("usage-monitor"))] == ["shared"]
    assert found.contexts["my-env-1"].env == {"DUT_IP": "192.168.3.2"}
    assert (found.contexts["my-env-1"].conf.executors, found.contexts["shared"].conf.executors) == (1, 6)
    assert found.env == {"EVERYWHERE": "1"}
    assert str(found.helpers) == f"{path}/scripts"
    assert {name: str(place) for name, place in found.scripts.items()} == {
        "hello.run": f"{path}/jobs/hello.run",
        "hello.before": f"{path}/jobs/hello.before",
        "usage-monitor.run": f"{path}/jobs/usage-monitor.run",
        "before": f"{path}/before",
    }
    assert found.groups_of("hello") == ["Hello Jobs", "All"]


def test_all_may_be_in_one_folder(make: Make) -> None:
    found = folder.read(make({"jobs/a.run": "", "jobs/after": "", "jobs/env": "A=1", "jobs/groups.conf": "G=a\n"}))
    assert (list(found.jobs), list(found.scripts), found.env) == (["a"], ["a.run", "after"], {"A": "1"})
    assert found.contexts_of(found.job("a"))[0].conf.executors == 6


def test_no_folder_has_no_jobs(tmp_path: Path) -> None:
    assert folder.read(tmp_path).jobs == {}


def test_toto_s_own_keys_are_read(make: Make) -> None:
    text = (
        "PARAMS = LEVEL=low|high -- how much is checked\nPARAMS=WHO\nPARAMS=NOTE=\n"
        "SCHEDULE=0 3 * * Mon-Fri Europe/Berlin\nSCHEDULE=*/5 * * * *\nAFTER=b\nNETWORK=none\nGRACE=0.5\n"
    )
    job = folder.read(make({"jobs/a.run": "", "jobs/a.conf": text, "jobs/b.run": ""})).job("a")
    level, who, note = job.conf.params
    assert (level.default, level.choices, level.description) == ("low", ("low", "high"), "how much is checked")
    assert (who.default, note.default) == (None, "")
    assert job.conf.schedule == (Schedule("0 3 * * Mon-Fri", "Europe/Berlin"), Schedule("*/5 * * * *"))
    assert job.values({"WHO": "me", "more": "x"}) == {"LEVEL": "low", "WHO": "me", "NOTE": "", "more": "x"}
    for given, why in (
        ({}, "WHO is missing"),
        ({"WHO": "me", "LEVEL": "all"}, "low, high"),
        ({"WHO": "", "": ""}, "no parameter"),
    ):
        with pytest.raises(InputError, match=why):
            job.values(given)


JOB = {"jobs/a.run": "", "jobs/b.run": ""}
WRONG = {
    "an unknown key": ({"jobs/a.conf": "\nTIMEOUTS=3\n"}, "jobs/a.conf:2: 'TIMEOUTS' is not a known key; did you mean"),
    "a key in small letters": ({"jobs/a.conf": "timeout=3"}, "jobs/a.conf:1: 'timeout' is not a known key; did you"),
    "no number": ({"jobs/a.conf": "TIMEOUT=soon"}, "jobs/a.conf:1: TIMEOUT: should be a number, not 'soon'"),
    "too large": ({"jobs/a.conf": "TIMEOUT=1e9"}, "jobs/a.conf:1: TIMEOUT: should be at most 604800"),
    "a long grace": ({"jobs/a.conf": "GRACE=41"}, "jobs/a.conf:1: GRACE: should be at most 40"),
    "no line": ({"jobs/a.conf": "# x\nTIMEOUT"}, "jobs/a.conf:2: 'TIMEOUT' is no KEY=value"),
    "a key twice": ({"jobs/a.conf": "TIMEOUT=1\nTIMEOUT=2"}, "jobs/a.conf:2: TIMEOUT is set again; line 1 has set it"),
    "no cron": (
        {"jobs/a.conf": "SCHEDULE=0 3 * * *\nSCHEDULE=61 * * * *"},
        "jobs/a.conf:2: SCHEDULE: '61 * * * *' is no cron line",
    ),
    "too few fields": ({"jobs/a.conf": "SCHEDULE=@daily"}, "jobs/a.conf:1: SCHEDULE: should be five fields"),
    "never": ({"jobs/a.conf": "SCHEDULE=0 0 30 2 *"}, "jobs/a.conf:1: SCHEDULE: '0 0 30 2 *' is "),
    "no zone": (
        {"jobs/a.conf": "SCHEDULE=0 3 * * * Mars/Base"},
        "jobs/a.conf:1: SCHEDULE: 'Mars/Base' is no time zone",
    ),
    "a zone that is a path": (
        {"jobs/a.conf": "SCHEDULE=0 3 * * * ../../../etc/passwd"},
        "jobs/a.conf:1: SCHEDULE: '../../../etc/passwd' is no time zone",
    ),
    "a circle": (
        {"jobs/a.conf": "# x\n AFTER=b", "jobs/b.conf": "AFTER=a"},
        "jobs/a.conf:2: AFTER: this goes round in a circle: a after b after a",
    ),
    "after itself": ({"jobs/a.conf": "AFTER=a"}, "jobs/a.conf:1: AFTER: this goes round in a circle: a after a"),
    "after nothing": ({"jobs/a.conf": "AFTER=c"}, "jobs/a.conf:1: AFTER: there is no job 'c'"),
    "after a path": ({"jobs/a.conf": "AFTER=../x"}, "jobs/a.conf:1: AFTER: should be 1 to 63 letters"),
    "no context": ({"jobs/a.conf": "CONTEXTS=arm"}, "jobs/a.conf:1: CONTEXTS: no context takes it: 'arm' is none of"),
    "no default context": ({"jobs/contexts/arm.conf": "JOBS=b"}, "jobs/a.conf: no context takes it"),
    "executors": ({"jobs/contexts/arm.conf": "EXECUTORS=0"}, "jobs/contexts/arm.conf:1: EXECUTORS: should be at least"),
    "a parameter of toto's": ({"jobs/a.conf": "PARAMS=PATH=x"}, "jobs/a.conf:1: PARAMS: PATH is set by toto"),
    "a parameter that is none": ({"jobs/a.conf": "PARAMS=a b"}, "jobs/a.conf:1: PARAMS: should be NAME, NAME=default"),
    "a parameter twice": ({"jobs/a.conf": "PARAMS=A\nPARAMS=A=1"}, "jobs/a.conf:2: PARAMS: A is declared twice"),
    "a matrix of one": ({"jobs/a.conf": "MATRIX=A=1"}, "jobs/a.conf:1: MATRIX: A should have several values: A=this|"),
    "a huge matrix": (
        {"jobs/a.conf": "".join(f"MATRIX={name}=1|2\n" for name in "ABCDEFG")},
        "jobs/a.conf:7: MATRIX: makes 128 runs; at most 64",
    ),
    "a matrix of parameters": (
        {"jobs/a.conf": "PARAMS=A=1|2\nMATRIX=A=1|2"},
        "jobs/a.conf:2: MATRIX: A is declared in PARAMS, too",
    ),
    "no event": ({"jobs/a.conf": "ON=deploy"}, "jobs/a.conf:1: ON: should be "),
    "no yes": ({"jobs/a.conf": "ONCE=perhaps"}, "jobs/a.conf:1: ONCE: should be "),
    "a lock that is a path": ({"jobs/a.conf": "LOCKS=../x"}, "jobs/a.conf:1: LOCKS: should be 1 to 63 letters"),
    "a command and a script": ({"jobs/a.conf": "COMMAND=true"}, "jobs/a.conf: has a COMMAND, and there is a.run"),
    "no command": ({"jobs/c.conf": "COMMAND=echo 'x"}, "jobs/c.conf:1: COMMAND: is no command for a shell: no closing"),
    "a job's name": ({"jobs/..run": "", "jobs/x y.run": ""}, "jobs/x y.run: a job's name should be 1 to 63 letters"),
    "a conf alone": ({"jobs/c.conf": ""}, "jobs/c.conf: there is no c.run beside it; add it, or a COMMAND="),
    "no text": ({"jobs/a.conf": "# x\nDESCRIPTION=\udcff"}, "jobs/a.conf:2: is not UTF-8"),
    "a zero byte": ({"jobs/a.env": "A=1\nB=\0"}, "jobs/a.env:2: has a zero byte"),
    "a huge file": ({"jobs/a.env": "A" * (1 << 20) + "A"}, "jobs/a.env: should be a plain file of at most 1 MiB"),
    "a group with a tag of toto's": (
        {"jobs/groups.conf": "repo:other=.*"},
        "jobs/groups.conf:1: 'repo:other' has a colon",
    ),
    "no pattern": ({"jobs/groups.conf": "G=["}, "jobs/groups.conf:1: '[' is no regular expression"),
    "an evil pattern": ({"jobs/groups.conf": "G=^(a+)+$"}, "jobs/groups.conf:1: '^(a+)+$' may take too long"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_mistake_is_one_clear_error(make: Make, case: str) -> None:
    files, told = WRONG[case]
    with pytest.raises(JobsError) as raised:
        folder.read(make(JOB | files))
    assert any(each.startswith(told) for each in raised.value.problems), raised.value
    assert len(raised.value.problems) <= 2


def test_a_conf_is_not_read_through_a_link(make: Make) -> None:
    tree = make(JOB)
    (tree / "jobs/a.conf").symlink_to("/etc/passwd")
    with pytest.raises(JobsError, match=r"a\.conf: should be a plain file"):
        folder.read(tree)
    (tree / "jobs/a.conf").unlink()
    os.mkfifo(tree / "jobs/a.env")
    with pytest.raises(JobsError, match=r"a\.env: should be a plain file"):
        folder.read(tree)


def test_an_unknown_job_is_told_with_those_that_are_known(make: Make) -> None:
    for name in ("../x", "c", ""):
        with pytest.raises(InputError, match=r"there is no job .*\nnext: known are a, b"):
            folder.read(make(JOB)).job(name)
