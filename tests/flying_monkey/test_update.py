"""What a machine does with a document: in a bubble, where every step can be stopped."""

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flying_monkey.desired import Deadlines, Hooks, Phase
from tests.flying_monkey.bubble import RUN, Bubble

HOOKS = Hooks(prepare=("drain", "backup"), finish=("undrain",))


@pytest.fixture
def bubble(tmp_path: Path, new_key: Callable[[str], Path]) -> Iterator[Bubble]:
    made = Bubble(tmp_path.resolve() / "machine", new_key("signer"))
    made.hook("prepare.d/drain")
    made.hook("prepare.d/backup")
    made.hook("finish.d/undrain")
    made.hook("checks.d/web", "echo 1..1; echo ok 1 - it answers")
    with made:
        yield made


def test_a_system_is_prepared_for_tried_checked_kept_and_finished(bubble: Bubble) -> None:
    assert bubble.say(bubble.document(hooks=HOOKS)) == {"serial": 1, "step": "accepted"}
    status = bubble.ended()
    assert (status["phase"], status["step"], status["state"]) == ("try", "tried", "done 0"), status
    assert (status["system"], status["boots"]) == (bubble.new.path, bubble.good.path)
    assert status["hooks"] == {"prepare.d/drain": "", "prepare.d/backup": ""} and status["checks"] == {"web": ""}
    assert bubble.say(bubble.document(phase="keep", hooks=HOOKS)) == {"serial": 2, "step": "kept"}
    status = bubble.ended()
    assert (status["phase"], status["step"], status["state"]) == ("keep", "finished", "done 0"), status
    assert (status["system"], status["boots"]) == (bubble.new.path, bubble.new.path)
    assert bubble.events() == [
        *("verify", "drain try", "backup try", "new test", "new test done", "web try"),
        *("verify", "profile", "profile-set", "new switch", "new switch done", "undrain kept"),
    ]
    assert "checks.d/web: done" in bubble.log()


def is_finished(bubble: Bubble, state: str, system: str, reason: str) -> dict[str, object]:
    """Check that the machine is whole: all of it is over, and `undrain` ran, with this reason, if `drain` did."""
    status = bubble.ended()
    assert (status["step"], status["state"]) == ("finished", state), status
    assert status["system"] == status["boots"] == system, status
    assert status["drift"] == ""
    events = bubble.events()
    assert [each for each in events if each.startswith("undrain")][-1:] == (
        [f"undrain {reason}"] if "drain try" in events or "prepare.d/drain" in status.get("hooks", ()) else []
    )
    return status


TRIED = Hooks(prepare=("drain",), finish=("undrain",))


@pytest.mark.parametrize("failing", ["prepare.d/drain", "checks.d/web", "new test"])
def test_what_fails_stops_a_try_and_is_told_by_name(bubble: Bubble, failing: str) -> None:
    match failing:
        case "prepare.d/drain":
            bubble.hook(failing, "echo no room elsewhere; exit 3")
        case "checks.d/web":
            bubble.hook(failing, "echo 1..2; echo ok 1; echo not ok 2 - the front page")
        case _:
            bubble.system("new", "exit 1")
    bubble.say(bubble.document(hooks=HOOKS))
    status = is_finished(bubble, "back 0", bubble.good.path, "back")
    assert {
        "prepare.d/drain": "the hook prepare.d/drain failed: it exited with status 3",
        "checks.d/web": "the check web failed: 1 of 2 failed: 2 - the front page",
        "new test": "its activation exited with status 1",
    }[failing] == status["error"]
    refused = bubble.say(bubble.document(phase="keep"))
    assert refused == {"error": status["error"], "kind": "NotReady"}
    if failing == "prepare.d/drain":
        assert bubble.events() == ["verify", "drain try", "undrain back"]
        assert "no room elsewhere" in bubble.log()


def test_a_hook_that_hangs_is_ended_and_so_is_what_it_started(bubble: Bubble) -> None:
    bubble.hook("prepare.d/drain", "trap '' TERM; sleep 1001 & sleep 1002")
    bubble.say(bubble.document(hooks=TRIED, deadlines=Deadlines(prepare=1)))
    status = is_finished(bubble, "back 0", bubble.good.path, "back")
    assert status["error"] == "the hook prepare.d/drain failed: it did not end within 1 s"
    assert "100" not in bubble.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -o 'sleep 100[0-9]' || true")


@pytest.mark.parametrize(("mode", "problem"), [(0o777, "others may write to it"), (0o644, "not a program")])
def test_a_hook_that_is_not_roots_alone_is_not_run(bubble: Bubble, mode: int, problem: str) -> None:
    (bubble.etc / "flying-monkey/prepare.d/drain").chmod(mode)
    bubble.say(bubble.document(hooks=TRIED))
    assert problem in str(is_finished(bubble, "back 0", bubble.good.path, "back")["error"])
    assert "drain try" not in bubble.events()


def test_a_closure_that_is_not_signed_and_a_hash_that_differs_stop_it_before_any_hook(bubble: Bubble) -> None:
    (bubble.root / bubble.new.path[1:] / "untrusted").touch()
    bubble.say(bubble.document(hooks=TRIED))
    is_finished(bubble, "back 0", bubble.good.path, "back")
    bubble.say(bubble.document(replace(bubble.new, nar_hash=bubble.good.nar_hash), hooks=TRIED))
    assert "has the hash" in str(is_finished(bubble, "back 0", bubble.good.path, "back")["error"])
    assert bubble.events() == ["verify", "verify"]


def test_units_that_fail_since_are_told_and_those_that_failed_before_are_not(bubble: Bubble) -> None:
    (bubble.var / "broken").write_text("old.service loaded failed\n")
    bubble.system("new", "echo new.service loaded failed >> /var/lib/broken")
    bubble.say(bubble.document())
    status = is_finished(bubble, "back 0", bubble.good.path, "back")
    assert status["error"] == "units have failed since: new.service"
    assert status["failed_units"] == ["old.service", "new.service"]


def test_what_nobody_keeps_goes_back_by_itself(bubble: Bubble) -> None:
    bubble.say(bubble.document(hooks=TRIED, deadlines=Deadlines(confirm=2)))
    while (status := bubble.status(5))["step"] != "finished":
        assert status["state"] in ("running", "done 0")
    status = is_finished(bubble, "back 0", bubble.good.path, "back")
    assert status["error"] == "it was not confirmed in time, and the machine has gone back"
    assert bubble.say(bubble.document(phase="keep"))["error"] == status["error"]


def test_to_go_back_is_obeyed_at_any_time(bubble: Bubble) -> None:
    bubble.stop_at("drain try")
    bubble.say(bubble.document(hooks=TRIED))
    bubble.reached("drain try")
    (bubble.var / "stop").unlink()
    bubble.say(bubble.document(bubble.good, "back", hooks=TRIED))
    is_finished(bubble, "done 0", bubble.good.path, "back")
    assert bubble.events() == [
        *("verify", "drain try", "verify", "profile", "profile-set", "good switch", "good switch done", "undrain back")
    ]
    bubble.say(bubble.document(hooks=TRIED))
    assert bubble.ended()["state"] == "done 0"
    bubble.say(bubble.document(bubble.good, "back", hooks=TRIED))
    is_finished(bubble, "done 0", bubble.good.path, "back")


def test_to_go_back_does_not_wait_for_what_somebody_else_has_begun(bubble: Bubble) -> None:
    """As a run of before the machine obeyed documents: its watchdog holds up every later activation."""
    bubble.facts()  # (which writes the script)
    begin = f"sh /run/toto/activate.sh begin run.test.1 test {bubble.new.path} {bubble.good.path} {bubble.good.path}"
    bubble.sh(f"{begin} 20 3000 && sh /run/toto/activate.sh result run.test.1 20")
    bubble.say(bubble.document(bubble.good, "back", hooks=TRIED))
    is_finished(bubble, "done 0", bubble.good.path, "back")
    assert bubble.sh("sh /run/toto/activate.sh result run.test.1 0").startswith("back 0")


def test_only_what_is_tried_is_kept_and_a_newer_try_waits(bubble: Bubble) -> None:
    other = bubble.system("spare")
    assert "this machine runs" in bubble.say(bubble.document(phase="keep"))["error"]
    bubble.stop_at("new test")
    first = bubble.document()
    bubble.say(first)
    bubble.reached("new test")
    for early in (bubble.document(phase="keep"), bubble.document(other), bubble.document(other, "keep")):
        assert bubble.say(early)["kind"] == "NotReady", early
    assert bubble.say(first) == {"serial": first.serial, "step": "tried"}, "said before"
    bubble.release()
    assert bubble.ended()["state"] == "done 0"
    assert "not finished: it is tried" in bubble.say(bubble.document(other))["error"]
    assert "not finished: it is tried" in bubble.say(bubble.document(other, "keep"))["error"]
    bubble.say(bubble.document(phase="keep"))
    is_finished(bubble, "done 0", bubble.new.path, "kept")
    assert bubble.say(bubble.document(phase="keep"))["step"] == "finished", "what runs already"
    is_finished(bubble, "done 0", bubble.new.path, "kept")


def test_a_document_to_keep_also_settles_what_was_begun_without_one(bubble: Bubble) -> None:
    bubble.facts()  # (which writes the script)
    begin = f"sh /run/toto/activate.sh begin run.test.1 test {bubble.new.path} {bubble.good.path} {bubble.good.path}"
    bubble.sh(f"{begin} 20 3 && sh /run/toto/activate.sh result run.test.1 20")
    bubble.say(bubble.document(phase="keep"))
    is_finished(bubble, "done 0", bubble.new.path, "kept")
    assert bubble.sh("sleep 3.5; ls -d /run/toto/*/confirmed") == "/run/toto/run.test.1/confirmed"
    assert bubble.status()["system"] == bubble.new.path


ALL = [
    *("verify", "drain try", "backup try", "new test", "new test done", "web try", "wait"),
    *(
        "keep verify",
        "keep profile",
        "keep profile-set",
        "keep new switch",
        "keep new switch done",
        "keep undrain kept",
    ),
    *("late good test", "late good test done", "late undrain back"),
    *("back verify", "back profile", "back profile-set", "back good switch", "back undrain back"),
]

# All of them take two minutes.
CUTS = ALL if os.environ.get("TOTO_CUTS") else random.Random(1).sample(ALL, 4)


def begun_up_to(bubble: Bubble, cut: str) -> str:
    """Have an update come as far as `cut`; which system the machine is to have then."""
    first, _, then = cut.partition(" ")
    late = Deadlines(confirm=1) if first == "late" else Deadlines(confirm=60)
    if first not in ("keep", "late", "back", "wait"):
        bubble.stop_at(cut)
    if first == "late":
        bubble.stop_at(then)
    bubble.say(bubble.document(hooks=HOOKS, deadlines=late))
    wanted = bubble.good
    if first in ("keep", "back"):
        assert bubble.ended()["state"] == "done 0"
        bubble.stop_at(then)
        phase: Phase = "keep" if first == "keep" else "back"
        wanted = bubble.new if phase == "keep" else bubble.good
        bubble.say(bubble.document(wanted, phase, hooks=HOOKS))
    if first == "wait":
        assert bubble.ended()["state"] == "done 0"
    else:
        bubble.reached(then if first in ("keep", "late", "back") else cut)
    return wanted.path


@pytest.mark.parametrize("cut", CUTS)
def test_a_power_cut_at_any_step_leaves_nothing_half_done(bubble: Bubble, cut: str) -> None:
    wanted = begun_up_to(bubble, cut)
    bubble.power_cut()
    bubble.boot()
    bubble.resume()
    kept = cut.partition(" ")[0]
    status = is_finished(
        bubble, "done 0" if kept in ("keep", "back") else "back 0", wanted, {"keep": "kept"}.get(kept, "back")
    )
    if kept not in ("keep", "back"):
        assert "rebooted" in str(status["error"]) or "not confirmed in time" in str(status["error"])
    bubble.say(bubble.document(hooks=HOOKS))
    assert bubble.ended()["state"] == "done 0", "the next one is obeyed"


@pytest.mark.parametrize("cut", CUTS)
def test_an_update_that_is_killed_at_any_step_goes_on(bubble: Bubble, cut: str) -> None:
    wanted = begun_up_to(bubble, cut)
    bubble.kill("flying_monkey.update")
    bubble.release()
    match cut.partition(" ")[0]:
        case "late":
            while bubble.status(5)["step"] != "finished":
                pass
            assert "not confirmed" in str(is_finished(bubble, "back 0", wanted, "back")["error"])
        case "back":
            is_finished(bubble, "done 0", wanted, "back")
        case "keep":
            is_finished(bubble, "done 0", wanted, "kept")
        case _:
            assert bubble.ended()["state"] == "done 0"
            bubble.say(bubble.document(phase="keep", hooks=HOOKS))
            is_finished(bubble, "done 0", bubble.new.path, "kept")


WRITES = [(phase, when, nth) for phase in ("try", "keep") for when in ("before", "after") for nth in range(1, 7)]


@pytest.mark.parametrize(
    ("phase", "when", "nth"), WRITES if os.environ.get("TOTO_CUTS") else random.Random(1).sample(WRITES, 4)
)
def test_a_kill_between_any_two_steps_leaves_no_update_half_done(
    bubble: Bubble, phase: Phase, when: str, nth: int
) -> None:
    if phase == "keep":
        bubble.say(bubble.document(hooks=HOOKS))
        assert bubble.ended()["state"] == "done 0"
    bubble.accept(bubble.document(phase=phase, hooks=HOOKS))
    bubble.kill("flying_monkey.update")
    bubble.python(RUN.replace("WHEN", repr(when)).replace("NTH", str(nth)))
    if phase == "try":
        assert bubble.ended()["state"] == "done 0"
        bubble.say(bubble.document(phase="keep", hooks=HOOKS))
    is_finished(bubble, "done 0", bubble.new.path, "kept")


def test_a_full_disk_activates_nothing_and_is_told(tmp_path: Path, new_key: Callable[[str], Path]) -> None:
    bubble = Bubble(tmp_path.resolve() / "machine", new_key("signer"), memory_size=65_536)
    bubble.hook("prepare.d/drain")
    bubble.hook("finish.d/undrain")
    fill, free = "cat /dev/zero > /var/lib/flying-monkey/filler || true", "rm /var/lib/flying-monkey/filler"
    with bubble:
        first = bubble.document(hooks=TRIED)
        bubble.sh(f"mkdir -p /var/lib/flying-monkey; {fill}")
        assert bubble.say(first)["error"].endswith("No space left on device")
        assert bubble.events() == []
        bubble.sh(free)
        bubble.stop_at("verify")
        bubble.say(first)
        bubble.reached("verify")
        bubble.sh(fill)
        bubble.release()
        while "error" not in (status := bubble.status(1)):
            assert (status["step"], status["state"]) == ("accepted", "running")
        assert status["error"].endswith("No space left on device")
        bubble.sh(free)
        is_finished(bubble, "back 0", bubble.good.path, "back")
        assert bubble.events() == ["verify"]

        bubble.say(bubble.document(hooks=TRIED, deadlines=Deadlines(confirm=4)))
        assert bubble.ended()["state"] == "done 0"
        bubble.sh(fill)
        assert bubble.say(bubble.document(phase="keep"))["kind"] == "Lost"
        while "undrain back" not in bubble.events():
            bubble.status(1)
        bubble.sh(free)
        while bubble.status(5)["step"] != "finished":
            pass
        is_finished(bubble, "back 0", bubble.good.path, "back")


def test_a_watchdog_that_is_killed_lets_the_machine_go_back_all_the_same(bubble: Bubble) -> None:
    bubble.say(bubble.document(hooks=TRIED))
    assert bubble.ended()["state"] == "done 0"
    bubble.kill("guard.sh")
    while bubble.status(5)["step"] != "finished":
        pass
    is_finished(bubble, "back 0", bubble.good.path, "back")


def test_what_is_only_to_be_booted_goes_back_after_a_power_cut_too(bubble: Bubble) -> None:
    bubble.say(bubble.document(activation="boot"))
    status = bubble.ended()
    assert (status["state"], status["system"], status["boots"]) == ("done 0", bubble.good.path, bubble.new.path)
    bubble.power_cut()
    bubble.boot()
    status = bubble.ended()
    assert (status["step"], status["state"]) == ("finished", "back 0")
    assert (status["system"], status["boots"]) == (bubble.new.path, bubble.good.path), "until it is booted again"


def test_drift_and_a_needed_reboot_are_told(bubble: Bubble) -> None:
    for system, kernel in ((bubble.good, "old"), (bubble.new, "fresh")):
        (bubble.root / system.path[1:] / "kernel").symlink_to(f"/nix/store/{kernel}")
    bubble.say(bubble.document())
    assert bubble.ended()["reboot_needed"] is False
    bubble.say(bubble.document(phase="keep"))
    facts = (bubble.ended(), bubble.facts())[1]
    assert (facts["reboot_needed"], facts["drift"], facts["failed_units"]) == (True, "", [])
    bubble.sh(f"ln -sfn {bubble.good.path} /run/current-system")
    assert bubble.facts()["drift"] == f"it runs {bubble.good.path}, and not {bubble.new.path}"


def test_a_different_kernel_is_rebooted_into_when_the_document_says_so(bubble: Bubble) -> None:
    for system, kernel in ((bubble.good, "old"), (bubble.new, "fresh")):
        (bubble.root / system.path[1:] / "kernel").symlink_to(f"/nix/store/{kernel}")
    bubble.say(bubble.document(hooks=HOOKS))
    assert bubble.ended()["state"] == "done 0"
    bubble.stop_at("reboot")
    bubble.say(bubble.document(phase="keep", hooks=HOOKS, reboot="now"))
    bubble.reached("reboot")
    assert bubble.status()["reboot_needed"] is True
    bubble.power_cut()
    bubble.boot()
    bubble.resume()
    assert is_finished(bubble, "done 0", bubble.new.path, "kept")["reboot_needed"] is False
    assert bubble.events()[-4:] == ["new switch done", "reboot", "web reboot", "undrain kept"]
    bubble.hook("checks.d/web", "echo 1..1; echo not ok 1 - it answers")
    (bubble.root / bubble.good.path[1:] / "initrd").symlink_to("/nix/store/other")
    bubble.sh(f"ln -sfn {bubble.good.path} /run/current-system")
    bubble.say(bubble.document(bubble.good, "keep", hooks=HOOKS, reboot="now", deadlines=Deadlines(activate=1)))
    status = bubble.ended()
    assert (status["state"], status["error"]) == ("done 69", "the machine does not reboot")
    assert bubble.events()[-4:] == ["drain reboot", "backup reboot", "reboot", "undrain kept"]


@pytest.mark.parametrize("seconds", [-1, 3])
def test_a_machine_does_not_reboot_once_the_time_for_that_is_over(bubble: Bubble, seconds: int) -> None:
    """Also when it is over only after its hooks."""
    (bubble.root / bubble.good.path[1:] / "kernel").symlink_to("/nix/store/fresh")
    bubble.sh(f"ln -sfn {bubble.new.path} /run/booted-system")
    bubble.hook("prepare.d/backup", "sleep 4")
    until = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds)
    bubble.say(bubble.document(bubble.good, "keep", hooks=HOOKS, reboot="now", reboot_until=until))
    status = is_finished(bubble, "done 0", bubble.good.path, "kept")
    assert status["reboot_needed"] is True and "error" not in status
    assert "reboot" not in bubble.events()
    assert "it does not reboot: the time for that was over at " in bubble.log()


def test_a_reboot_into_something_else_is_told(bubble: Bubble) -> None:
    (bubble.root / bubble.new.path[1:] / "kernel").symlink_to("/nix/store/fresh")
    bubble.say(bubble.document(hooks=HOOKS))
    assert bubble.ended()["state"] == "done 0"
    bubble.stop_at("reboot")
    bubble.say(bubble.document(phase="keep", hooks=HOOKS, reboot="now"))
    bubble.reached("reboot")
    bubble.power_cut()
    bubble.boot()
    bubble.sh(f"ln -sfn {bubble.good.path} /run/booted-system")
    bubble.resume()
    status = is_finished(bubble, "done 69", bubble.new.path, "kept")
    assert str(status["error"]).endswith("look at its boot loader")


def test_a_power_cut_before_the_switch_does_not_spare_the_reboot(bubble: Bubble) -> None:
    for system, kernel in ((bubble.good, "old"), (bubble.new, "fresh")):
        (bubble.root / system.path[1:] / "kernel").symlink_to(f"/nix/store/{kernel}")
    bubble.say(bubble.document(hooks=HOOKS))
    assert bubble.ended()["state"] == "done 0"
    bubble.stop_at("profile")
    bubble.say(bubble.document(phase="keep", hooks=HOOKS, reboot="now"))
    bubble.reached("profile")
    bubble.power_cut()
    bubble.boot()
    bubble.stop_at("reboot")
    bubble.resume()
    bubble.reached("reboot")
    bubble.power_cut()
    bubble.boot()
    bubble.resume()
    assert is_finished(bubble, "done 0", bubble.new.path, "kept")["reboot_needed"] is False
    assert bubble.events()[-4:] == ["new switch done", "reboot", "web reboot", "undrain kept"]


@pytest.mark.parametrize(
    "confirm",
    [
        "sh /run/toto/activate.sh confirm ${each##*/}",
        "mkdir $each/decided; sleep 1; : >$each/confirmed; echo confirmed",
    ],
)
def test_roots_own_word_keeps_what_is_tried(bubble: Bubble, confirm: str) -> None:
    """As when toto moves from documents to sudo: the new configuration may have nothing left that takes a document."""
    bubble.say(bubble.document(hooks=TRIED))
    assert bubble.ended()["step"] == "tried"
    assert bubble.sh(f"for each in /run/toto/monkey.*; do {confirm}; done") == "confirmed"
    end = time.monotonic() + 60
    while (status := bubble.status())["step"] != "finished" and time.monotonic() < end:
        time.sleep(0.1)
    assert (status["step"], status["state"]) == ("finished", "done 0"), status
    assert (status["system"], status["boots"]) == (bubble.new.path, bubble.good.path)
    assert bubble.events()[-1] == "undrain kept" and "error" not in status


@pytest.mark.parametrize("resting", [True, False])
def test_only_a_document_of_a_run_undoes_what_somebody_changed_by_hand(bubble: Bubble, resting: bool) -> None:
    """One that is renewed while no run works on the machine does not, unless it leads elsewhere."""
    bubble.say(bubble.document())
    bubble.ended()
    bubble.say(bubble.document(phase="keep"))
    is_finished(bubble, "done 0", bubble.new.path, "kept")
    by_hand, events = bubble.system("by-hand").path, bubble.events()
    bubble.sh(f"ln -sfn {by_hand} /run/current-system; ln -sfn {by_hand} /nix/var/nix/profiles/system")
    bubble.say(bubble.document(bubble.new, "back", resting=resting))
    status = bubble.ended()
    wanted = by_hand if resting else bubble.new.path
    assert (status["state"], status["system"], status["boots"]) == ("done 0", wanted, wanted)
    if resting:
        assert status["drift"] == f"it runs {by_hand}, and not {bubble.new.path}" and bubble.events() == events
        bubble.say(bubble.document(bubble.good, "back", resting=True))
        is_finished(bubble, "done 0", bubble.good.path, "back")


@pytest.mark.parametrize("phase", ["keep", "back"])
def test_a_newer_document_for_what_was_kept_changes_nothing(bubble: Bubble, phase: Phase) -> None:
    bubble.say(bubble.document(hooks=TRIED))
    bubble.ended()
    bubble.say(bubble.document(phase="keep", hooks=TRIED))
    is_finished(bubble, "done 0", bubble.new.path, "kept")
    events = bubble.events()
    said = bubble.say(bubble.document(system=bubble.new, phase=phase, hooks=TRIED))
    assert said == {"serial": 3, "step": "finished"}
    is_finished(bubble, "done 0", bubble.new.path, "kept")
    assert bubble.events() == events
