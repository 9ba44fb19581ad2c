"""The contract of a run, case by case: what laminar gives a job's scripts, and what comes of them.

Each case was seen with laminar, or is in its manual or source. Where toto differs on purpose, the case is in
`DIFFERENT`, and docs/jobs.md names it.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from tests.jobs.conftest import Make
from toto.jobs.history import State

SUCCESS, FAILED, ABORTED = State.SUCCESS, State.FAILED, State.ABORTED
ALL = {
    "a.init": "echo init $(pwd)",
    "before": "echo before",
    "a.before": "echo a.before",
    "a.run": "echo a.run",
    "a.after": "echo a.after",
    "after": "echo after",
}
LASTING = "echo ready; sleep 3000 & wait"
PATIENT = "NETWORK=none\nGRACE=40\n"
BRIEF = "NETWORK=none\nGRACE=5\n"


@dataclass(frozen=True)
class Case:
    """Files of `jobs/`; what the job says in its last run, and how that ends.

    It runs `runs` times, with `parameters`. It is aborted when it has said `ready`, if it says that.
    """

    files: Mapping[str, str]
    said: Sequence[str] | None
    state: State = SUCCESS
    parameters: Mapping[str, str] = field(default_factory=dict)
    runs: int = 1


SAME = {
    "scripts run in order": Case(ALL, ["init /job/workspace", "before", "a.before", "a.run", "a.after", "after"]),
    "init runs in a new workspace only": Case(ALL, ["before", "a.before", "a.run", "a.after", "after"], runs=2),
    "init that failed does not run again": Case({"a.init": "exit 1", "a.run": "echo run"}, ["run"], runs=2),
    "scripts begin in an empty folder": Case({"a.run": "pwd; ls -A"}, ["/job/run"]),
    "scripts of a run share its folder": Case({"a.before": "echo 1 >x", "a.run": "cat x", "a.after": "ls"}, ["1", "x"]),
    "a failed init stops nothing": Case({"a.init": "exit 1", "a.run": "echo $RESULT"}, ["failed"], FAILED),
    "a failed global before stops nothing": Case({"before": "exit 1", "a.run": "echo $RESULT"}, ["failed"], FAILED),
    "a failed before stops nothing": Case({"a.before": "exit 1", "a.run": "echo $RESULT"}, ["failed"], FAILED),
    "RESULT is success until something fails": Case(
        {"a.before": "echo $RESULT", "a.run": "echo $RESULT", "a.after": "echo $RESULT"}, ["success"] * 3
    ),
    "after sees that the run failed": Case({"a.run": "exit 7", "a.after": "echo $RESULT"}, ["failed"], FAILED),
    "after runs after a failure": Case({"a.run": "exit 1", "a.after": "exit 1", "after": "echo x"}, ["x"], FAILED),
    "a failed after fails the run": Case(
        {"a.run": "", "a.after": "exit 1", "after": "echo $RESULT"}, ["failed"], FAILED
    ),
    "a failed global after fails the run": Case({"a.run": "echo x", "after": "exit 1"}, ["x"], FAILED),
    "the first failure wins": Case(
        {"a.before": "exit 1", "a.run": "kill -TERM $$", "a.after": "echo $RESULT"}, ["failed"], FAILED
    ),
    "LAST_RESULT is unknown at first": Case({"a.run": "echo $LAST_RESULT"}, ["unknown"]),
    "LAST_RESULT is that of the run before": Case({"a.run": "echo $LAST_RESULT; exit 1"}, ["failed"], FAILED, runs=2),
    "LAST_RESULT may be aborted": Case({"a.run": "echo $LAST_RESULT; kill -9 $$"}, ["aborted"], ABORTED, runs=2),
    "the job's variables win over the context's, those over all jobs'": Case(
        {
            "env": "A=all\nB=all\nC=all",
            "contexts/default.conf": "",
            "contexts/default.env": "B=context\nC=context",
            "a.env": "C=job",
            "a.run": "echo $A $B $C",
        },
        ["all context job"],
    ),
    "variables are literal": Case({"a.env": 'A="x  $HOME" # y\n', "a.run": 'printf "%s\\n" "$A"'}, ['"x  $HOME" # y']),
    "of two lines in a file the first counts": Case({"a.env": "A=1\nA=2", "a.run": "echo $A"}, ["1"]),
    "comments and lines without = say nothing": Case({"a.env": "#A=1\nA\n\nB=2", "a.run": "echo ${A-no} $B"}, ["no 2"]),
    "a parameter is a variable": Case({"a.run": "echo $A"}, ["x y"], parameters={"A": "x y"}),
    "a parameter does not override the job's variable": Case(
        {"a.env": "A=job", "a.run": "echo $A"}, ["job"], parameters={"A": "given"}
    ),
    "a parameter changes neither JOB nor PATH": Case(
        {"a.run": "echo $JOB $RUN $CONTEXT; ls -d /bin"},
        ["a 1 default", "/bin"],
        parameters={"JOB": "x", "PATH": "/x", "RUN": "9", "CONTEXT": "x"},
    ),
    "a file of variables does not change JOB": Case({"a.env": "JOB=x\nRUN=9", "a.run": "echo $JOB $RUN"}, ["a 1"]),
    "a file of variables may set PATH": Case(
        {"env": "PATH=/usr/bin:/bin", "a.run": "echo $PATH"}, ["/toto/bin:/usr/bin:/bin"]
    ),
    "the folder scripts comes first on PATH": Case(
        {"scripts/ls": "#!/bin/sh\necho mine", "a.run": "ls; echo ${PATH%%:*}"}, ["mine", "/infra/jobs/scripts"]
    ),
    "runs have numbers that continue": Case({"a.run": "echo $RUN"}, ["3"], runs=3),
    "the workspace is kept": Case({"a.run": "echo $RUN >>$WORKSPACE/x; cat $WORKSPACE/x"}, ["1", "2"], runs=2),
    "the archive is the run's own": Case({"a.run": "ls $ARCHIVE; touch $ARCHIVE/x"}, [], runs=2),
    "both streams are in the log, in order": Case({"a.run": "echo 1; echo 2 >&2; echo 3"}, ["1", "2", "3"]),
    "standard input is empty": Case({"a.run": "cat; echo end"}, ["end"]),
    "a script whose interpreter is not there fails": Case({"a.run": "#!/none/sh"}, None, FAILED),
    "a script without an interpreter's line fails": Case({"a.run": "#\n", "a.after": "echo $RESULT"}, None, FAILED),
    "a script ended by SIGTERM is aborted": Case(
        {"a.run": "kill -TERM $$", "after": "echo $RESULT"}, ["aborted"], ABORTED
    ),
    "a script ended by SIGKILL is aborted": Case(
        {"a.run": "kill -KILL $$", "after": "echo $RESULT"}, ["aborted"], ABORTED
    ),
    "abort ends the script's group, and after sees it": Case(
        {"a.conf": PATIENT, "a.run": LASTING, "a.after": "echo $RESULT", "after": "echo too"},
        ["ready", "aborted", "too"],
        ABORTED,
    ),
    "a script that catches SIGTERM and ends well is a success": Case(
        {"a.conf": PATIENT, "a.run": f"trap 'exit 0' TERM; {LASTING}", "a.after": "echo $RESULT"}, ["ready", "success"]
    ),
    "a script that catches SIGTERM and fails has failed": Case(
        {"a.conf": PATIENT, "a.run": f"trap 'exit 1' TERM; {LASTING}", "a.after": "echo $RESULT"},
        ["ready", "failed"],
        FAILED,
    ),
    "abort before the run skips it": Case(
        {"a.conf": PATIENT, "a.before": LASTING, "a.run": "echo run", "a.after": "echo $RESULT"},
        ["ready", "aborted"],
        ABORTED,
    ),
    "abort in after ends that, and the global one follows": Case(
        {"a.conf": PATIENT, "a.run": "echo run", "a.after": LASTING, "after": "echo $RESULT"},
        ["run", "ready", "aborted"],
        ABORTED,
    ),
    "after an abort a long after is cut": Case(
        {"a.conf": BRIEF, "a.run": LASTING, "a.after": "sleep 3000; echo no"}, ["ready"], ABORTED
    ),
    "a timeout aborts": Case(
        {"a.conf": f"{PATIENT}TIMEOUT=3", "a.run": "sleep 3000", "a.after": "echo $RESULT"}, ["aborted"], ABORTED
    ),
    "a timeout before the run skips it": Case(
        {"a.conf": f"{PATIENT}TIMEOUT=3", "a.before": "sleep 3000", "a.run": "echo run", "a.after": "echo $RESULT"},
        ["aborted"],
        ABORTED,
    ),
    "a timeout is for after, too": Case(
        {"a.conf": f"{BRIEF}TIMEOUT=3", "a.run": "", "a.after": "sleep 3000"}, [], ABORTED
    ),
    "a child in the background does not outlive its script": Case(
        {"a.run": "(sleep 3000; echo no) & echo run", "after": "echo after"}, ["run", "after"]
    ),
}
DIFFERENT = {
    # laminar kills .after with the script that ignores SIGTERM
    "after runs though the script ignored SIGTERM": Case(
        {"a.conf": BRIEF, "a.run": f"trap '' TERM; {LASTING}", "a.after": "echo $RESULT"}, ["ready", "aborted"], ABORTED
    ),
    # laminar takes that for a success
    "a script that crashes has failed": Case({"a.run": "kill -SEGV $$", "a.after": "echo $RESULT"}, ["failed"], FAILED),
    # laminar ends it with a success, though the run never began
    "abort in a before that ends well": Case(
        {
            "a.conf": PATIENT,
            "a.before": f"trap 'exit 0' TERM; {LASTING}",
            "a.run": "echo run",
            "a.after": "echo $RESULT",
        },
        ["ready", "aborted"],
        ABORTED,
    ),
    # laminar waits 5 s for it, after SIGHUP
    "a daemon ends with its script": Case(
        {"a.run": "setsid nohup sh -c 'trap \"\" HUP; sleep 3000; echo no' & echo run"}, ["run"]
    ),
}


@pytest.mark.parametrize("case", [*SAME, *DIFFERENT])
async def test_contract(make: Make, case: str) -> None:
    of = (SAME | DIFFERENT)[case]
    bench = make(of.files)
    for _ in range(of.runs):
        begun = bench.queue(**of.parameters)
        async with asyncio.timeout(240):
            running = asyncio.create_task(bench.run(begun=begun))
            while not running.done() and b"ready\n" not in bench.output:
                await asyncio.sleep(0.01)
            if b"ready\n" in bench.output:
                running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
    ended = bench.history.get("a", of.runs)
    assert (bench.said(ended) if of.said is not None else None, ended.state) == (of.said, of.state), bench.log(ended)
    assert not bench.history.work(ended).exists()
    assert bench.history.last_result("a") == of.state
