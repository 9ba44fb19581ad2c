"""What is no test is not run. (What a test may do is tried on a machine with real systemd.)"""

import io
import os

import pytest

from flying_monkey import gate, sandbox
from flying_monkey.machine import Configuration


@pytest.mark.parametrize(
    "argv", [None, [], "id", ["id", 3], [""], ["a\0b"], ["x"] * 65, ["id", "x" * 16_385], {"id": 1}]
)
def test_what_is_no_list_of_words_is_not_run(argv: object) -> None:
    with pytest.raises(sandbox.NotRun, match="a test is a list of at most 64 words"):
        sandbox.run(Configuration("infra", "web1", "signers"), argv)


def test_a_machine_may_refuse_all_tests() -> None:
    with pytest.raises(sandbox.NotRun, match="runs no tests"):
        sandbox.run(Configuration("infra", "web1", "signers", tests=False), ["id"])


@pytest.mark.parametrize(
    "line",
    ["test", "test ", "test W10 W10", "test W10\n", "test W1$0", "test W10===", "test " + "A" * 40_001, " test W10"],
)
def test_the_gate_takes_one_plain_word(line: str) -> None:
    assert gate._TEST.fullmatch(line) is None
    assert gate._TEST.fullmatch("test WyJpZCJd") and gate._TEST.fullmatch("test WyJpZCIsIngiXQ==")


def test_what_is_passed_on_is_bounded() -> None:
    class Sink(io.BytesIO):
        def close(self) -> None:
            self.written = self.getvalue()

    sink = Sink()
    sandbox.pump(io.BytesIO(b"x" * 100_000), sink, 70_000, b"first")
    assert sink.written == b"first" + b"x" * 70_000
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    os.close(writer)
    sink = Sink()
    sandbox.pump(reader, sink, 2)
    os.close(reader)
    assert sink.written == b"ab"
