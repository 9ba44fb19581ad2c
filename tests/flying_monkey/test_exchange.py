"""Servers that lie, stall, shout and hang up: the agent gets a whole answer or none, and in time."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from flying_monkey.apart import Failed
from flying_monkey.exchange import MOST, Answer, BadUrl, Server, exchange

HEAD = b'HTTP/1.1 200 OK\r\nContent-Length: 4\r\nETag: "ab"\r\n\r\n'


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[Server]:
    """A server that does `answer` with each connection, once it has got a request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        connection.recv(65_536)
                        answer(connection)
                    except OSError:
                        pass

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield Server("127.0.0.1", listener.getsockname()[1], False, "", None, None)
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def says(*parts: bytes, pause: float = 0) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)

    return answer


def ask(server: Server, longest: float = 5) -> Answer:
    return exchange(server, "GET", "/document", {"Authorization": "Bearer x"}, longest=longest)


def test_a_whole_answer_in_pieces_is_read() -> None:
    with serving(says(HEAD[:20], HEAD[20:], b"ab", b"cd", b"more", pause=0.05)) as server:
        answer = ask(server)
    assert (answer.status, answer.headers, answer.body) == (200, {"etag": '"ab"'}, b"abcd")


def test_an_answer_without_a_body_is_one() -> None:
    with serving(says(b"HTTP/1.1 304 Not Modified\r\nToto-Ask: abc\r\nServer: x\r\n\r\n")) as server:
        assert ask(server) == Answer(304, {"toto-ask": "abc"}, b"")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "cut short"),
        ([HEAD[:30]], "cut short"),
        ([HEAD, b"abc"], "cut short"),
        ([b"SSH-2.0-OpenSSH_9.2\r\n\r\n"], "no HTTP"),
        ([b"HTTP/1.1 999 What\r\n\r\n"], "no HTTP"),
        ([b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n"], "no HTTP"),
        ([b"HTTP/1.1 200 OK\r\nETag: \x1b[31m\r\n\r\n"], "no HTTP"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 9\r\n\r\n", b"abcd"], "no HTTP"),
        ([b"HTTP/1.1 200 OK\r\n\r\n", b"abcd"], "without its length"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n"], "without its length"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"], "without its length"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n"], f"more than {MOST} bytes"),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000], "too long"),
    ],
)
def test_what_is_no_whole_answer_is_none(parts: list[bytes], words: str) -> None:
    with serving(says(*parts)) as server, pytest.raises(Failed, match=words):
        ask(server)


@pytest.mark.parametrize("parts", [[], [b"H"] * 50, [HEAD, *[b"a"] * 3, *[b""] * 5]])
def test_a_server_that_stalls_costs_no_more_than_the_time_it_has(parts: list[bytes]) -> None:
    def answer(connection: socket.socket) -> None:
        says(*parts, pause=0.2)(connection)
        time.sleep(1)

    began = time.monotonic()
    with serving(answer) as server:
        with pytest.raises(Failed):
            ask(server, longest=0.8)
        assert time.monotonic() - began < 3


def test_a_reset_and_a_closed_port_and_an_unknown_name_are_told() -> None:
    def reset(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with serving(reset) as server:
        with pytest.raises(Failed, match="ConnectionResetError"):
            ask(server)
        with pytest.raises(Failed, match="ConnectionRefusedError"):
            ask(Server("127.0.0.1", 1, False, "", None, None))
    with pytest.raises(Failed, match="gaierror"):
        ask(Server("no-such-host.invalid", 443, True, "", None, None), longest=20)
    with serving(says(b"HTTP/1.1 200 OK\r\n\r\n")) as server, pytest.raises(Failed, match="SSL"):
        ask(Server("127.0.0.1", server.port, True, "", None, None))


@pytest.mark.parametrize(
    "url",
    [
        *("", "toto.lan", "ftp://toto", "https://toto:x", "https://user@toto", "https://toto/?x", "https://toto/a b"),
        *("http://toto.lan:80", "https://toto/\r\nX: y", "https://[::1", "https:///x"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(BadUrl):
        Server.at(url, None, None)


def test_addresses_are_read() -> None:
    assert Server.at("https://toto.lan/m/", None, None).url == "https://toto.lan:443/m"
    assert Server.at("https://[fd00::1]:4201", None, None).url == "https://[fd00::1]:4201"
    assert Server.at("http://127.0.0.1:80", None, None).url == "http://127.0.0.1:80"
