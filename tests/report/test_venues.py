"""Sending to real servers of HTTP and SMTP, and who is notified."""

import asyncio
import hashlib
import hmac
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.report.test_message import LINK, NASTY, failed
from tests.venue_servers import HttpServer, certificate, http_server, smtp_server, talkative_server
from toto.infra_repo.git import Commit
from toto.report.message import SLACK, Message, Problem
from toto.report.venues import Audience, Mail, Ntfy, Slack, Venue, VenueFailed, Webhook, venues_for

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH")  # by aiosmtpd, of what is on loopback
DONE = Message("infra", "done", "a deployed", changed=("a",), link=LINK)
STUCK = replace(failed(), stuck=(Problem.of("b", "COULD NOT BE REVERTED", "no ssh"),))
SECRET = "POISON-sesame"


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with http_server() as running:
        yield running


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def trusted(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The certificate, as that of a private authority that this process trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(pair[0]))
    return pair


def slack(server: HttpServer, **options: object) -> Slack:
    return replace(Slack(name="ops", url=f"{server.address}/services/T0/{SECRET}", pauses=(0, 0)), **options)  # type: ignore[arg-type]


def mail(port: int, **options: object) -> Mail:
    made = Mail(
        name="post",
        host="127.0.0.1",
        port=port,
        security="none",
        sender="toto@example.org",
        to=("ada@example.org", "bob@example.org"),
        pauses=(0, 0),
    )
    return replace(made, **options)  # type: ignore[arg-type]


async def refused(venue: Venue, message: Message = DONE) -> str:
    """The error of a venue that cannot be notified."""
    with pytest.raises(VenueFailed) as caught:
        await venue.send(message)
    assert caught.value.target == venue.name
    assert SECRET not in f"{caught.value}{venue!r}{caught.value.__cause__}"
    return str(caught.value)


# HTTP


async def test_slack_gets_one_text_with_its_formatting(server: HttpServer) -> None:
    await slack(server).send(failed())
    [request] = server.requests
    assert request.path == f"/services/T0/{SECRET}"
    assert json.loads(request.body) == {
        "text": f"🔴 *{failed().title}*\n{failed().text(SLACK)}",
        "unfurl_links": False,
        "unfurl_media": False,
    }


async def test_a_webhook_gets_json_with_a_signature_of_its_body(server: HttpServer) -> None:
    await Webhook(name="hook", url=f"{server.address}/x?y=1", secret=SECRET).send(failed())
    [request] = server.requests
    expected = hmac.new(SECRET.encode(), request.body, hashlib.sha256).hexdigest()
    assert request.headers["X-Hub-Signature-256"] == f"sha256={expected}"
    body = json.loads(request.body)
    assert (body["state"], body["id"]) == ("failed", request.headers["Idempotency-Key"])
    assert body["problems"][0]["lines"][0] == "not ok 2 - it says welcome"


async def test_a_webhook_without_a_secret_is_not_signed(server: HttpServer) -> None:
    await Webhook(name="hook", url=server.address).send(DONE)
    assert "X-Hub-Signature-256" not in server.requests[0].headers


@pytest.mark.parametrize(
    ("message", "priority", "tag"),
    [
        (DONE, "2", "white_check_mark"),
        (failed(), "4", "rotating_light"),
        (STUCK, "5", "rotating_light"),
        (replace(DONE, state="partial"), "3", "warning"),
        (replace(DONE, state="recovered"), "3", "white_check_mark"),
    ],
)
async def test_ntfy_gets_a_title_and_the_right_priority(
    server: HttpServer, message: Message, priority: str, tag: str
) -> None:
    await Ntfy(name="phone", url=f"{server.address}/topic", token=SECRET).send(message)
    [request] = server.requests
    assert {name: request.headers[name] for name in ("Title", "Priority", "Tags", "Click", "Authorization")} == {
        "Title": message.title,
        "Priority": priority,
        "Tags": tag,
        "Click": LINK,
        "Authorization": f"Bearer {SECRET}",
    }
    assert request.body.decode() == message.text()


async def test_a_title_that_is_no_ascii_is_encoded_and_a_long_text_cut_before_the_link(server: HttpServer) -> None:
    long = replace(DONE, repo="infra-ü", summary="ü" * 9000)
    await Ntfy(name="phone", url=server.address).send(long)
    [request] = server.requests
    assert request.headers["Title"] == "=?utf-8?B?W2luZnJhLcO8XSBhIGRlcGxveWVk?="
    assert len(request.body) <= 4000
    assert request.body.decode().endswith(f"ü …\n\n{LINK}")


async def test_nothing_in_a_message_makes_another_header(server: HttpServer) -> None:
    nasty = Message.broken_off(NASTY, Exception(NASTY), Commit("1", NASTY, NASTY), f"http://x/\r\nX-Evil: {NASTY}")
    for venue in (Ntfy(name="phone", url=server.address), Webhook(name="hook", url=server.address), slack(server)):
        await venue.send(nasty)
    assert len(server.requests) == 3
    for request in server.requests:
        assert not {"bcc", "x-evil", "click"} & {name.lower() for name in request.headers}


async def test_no_address_and_no_secret_is_logged_by_anyone(
    server: HttpServer, trusted: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await slack(server).send(DONE)
    await Webhook(name="hook", url=f"{server.address}/{SECRET}", secret=SECRET).send(DONE)
    await Ntfy(name="phone", url=f"{server.address}/{SECRET}", token=SECRET).send(DONE)
    assert "httpcore" in caplog.text  # the libraries do log here
    assert SECRET not in caplog.text


async def test_what_passes_is_tried_again_under_the_same_id(server: HttpServer) -> None:
    server.answers = [(503, "busy"), (429, "slow down"), (200, "ok")]
    await Webhook(name="hook", url=server.address, pauses=(0, 0)).send(DONE)
    assert len({request.headers["Idempotency-Key"] for request in server.requests}) == 1
    assert len(server.requests) == 3


async def test_tries_are_bounded(server: HttpServer) -> None:
    server.answers = [(500, f"no {SECRET} \x1b[31m<html>")]
    error = await refused(slack(server))
    assert error == f"ops: {server.address} answered 500: no {SECRET} <html> (3 tries)".replace(SECRET, "******")
    assert len(server.requests) == 3


async def test_what_is_refused_for_good_is_not_tried_again(server: HttpServer) -> None:
    server.answers = [(404, "no_service")]
    assert "answered 404: no_service\nnext: check the address" in await refused(slack(server))
    assert len(server.requests) == 1


async def test_a_redirect_is_not_followed(server: HttpServer) -> None:
    with http_server() as other:
        server.answers, server.location = [(307, "")], f"{other.address}/elsewhere"
        assert "redirects are not followed" in await refused(
            Ntfy(name="phone", url=f"{server.address}/{SECRET}", token=SECRET)
        )
        assert other.requests == []


async def test_no_proxy_and_no_netrc_of_the_environment_is_used(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login a password {SECRET}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    await slack(server).send(DONE)
    assert "Authorization" not in server.requests[0].headers


async def test_a_server_that_hangs_is_given_up(server: HttpServer) -> None:
    server.hangs = threading.Event()
    assert "did not answer within 0.3 s (3 tries)" in await refused(slack(server, timeout=0.3))


async def test_a_server_that_never_ends_its_answer_is_given_up() -> None:
    async with talkative_server(b"HTTP/1.1 200 OK\r\nX: ") as port:
        venue = Webhook(name="hook", url=f"http://127.0.0.1:{port}/{SECRET}", timeout=0.5, pauses=())
        await refused(venue)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x/",
        "file:///etc/passwd",
        "x",
        "",
        "http://",
        f"http://toto:{SECRET}@127.0.0.1/",
        "http://127.0.0.1:x/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\r\nX: y",
        "http://[::1/",
        "http://ü/",
    ],
)
async def test_an_error_about_a_wrong_address_does_not_quote_it(url: str) -> None:
    assert "its address is no http(s) address" in await refused(Webhook(name="hook", url=url, pauses=()))


async def test_an_error_about_a_server_that_is_away_does_not_quote_its_path() -> None:
    error = await refused(Webhook(name="hook", url=f"http://127.0.0.1:{free_port()}/{SECRET}?k={SECRET}", pauses=(0,)))
    assert "cannot be reached" in error and "(2 tries)" in error


async def test_an_error_about_a_wrong_token_does_not_quote_it(server: HttpServer) -> None:
    assert "its token" in await refused(Ntfy(name="phone", url=server.address, token=f"{SECRET}\nX: y"))


async def test_a_certificate_that_nobody_trusts_is_refused(pair: tuple[Path, Path]) -> None:
    async with smtp_server(pair, tls=True) as post:
        venue = Webhook(name="hook", url=f"https://localhost:{post.port}/{SECRET}", pauses=())
        assert "CERTIFICATE_VERIFY_FAILED" in await refused(venue)


# Mail


async def test_a_mail_has_subject_text_and_a_stable_id() -> None:
    async with smtp_server() as post:
        await mail(post.port).send(failed())
    [sent] = post.mails
    assert (sent["Subject"], sent["From"], sent["To"]) == (
        "[infra] b: rehearsal failed",
        "toto@example.org",
        "ada@example.org, bob@example.org",
    )
    assert sent["Message-ID"] == f"<{failed().id}@example.org>"
    assert sent["Auto-Submitted"] == "auto-generated"
    assert sent.get_content().replace("\r\n", "\n").rstrip("\n") == failed().text()
    assert post.envelopes[0].rcpt_tos == ["ada@example.org", "bob@example.org"]


@pytest.mark.parametrize("tls", [False, True])
async def test_mail_goes_by_tls_with_a_login(trusted: tuple[Path, Path], tls: bool) -> None:
    async with smtp_server(trusted, tls=tls, password=SECRET) as post:
        await mail(
            post.port, host="localhost", security="tls" if tls else "starttls", user="toto", password=SECRET
        ).send(DONE)
    assert len(post.mails) == len(post.logins) == 1


async def test_a_wrong_password_is_reported_at_once_and_not_shown(trusted: tuple[Path, Path]) -> None:
    async with smtp_server(trusted, password="another") as post:
        error = await refused(mail(post.port, host="localhost", security="starttls", user="toto", password=SECRET))
    assert "localhost refused: 5.7.8" in error and "check the addresses, user and password" in error
    assert post.logins == ["PLAIN", "LOGIN"] and post.mails == []


async def test_no_password_goes_to_a_server_without_tls() -> None:
    async with smtp_server(password=SECRET) as post:
        error = await refused(mail(post.port, security="starttls", user="toto", password=SECRET))
    assert "STARTTLS extension not supported" in error
    assert post.logins == [] and post.mails == []


async def test_no_mail_goes_to_a_server_that_nobody_trusts(pair: tuple[Path, Path]) -> None:
    for tls in (False, True):
        async with smtp_server(pair, tls=tls, password=SECRET) as post:
            error = await refused(mail(post.port, security="tls" if tls else "starttls", user="toto", password=SECRET))
        assert "CERTIFICATE_VERIFY_FAILED" in error
        assert post.logins == [] and post.mails == []


async def test_mail_in_the_clear_does_not_leave_this_machine() -> None:
    assert "goes to this machine only" in await refused(mail(25, host="mail.example.org"))


async def test_a_server_that_says_later_is_asked_again() -> None:
    async with smtp_server() as post:
        post.rcpt = ["451 later", "451 later"]
        await mail(post.port).send(DONE)
    assert len(post.mails) == 1


async def test_a_refused_recipient_is_named_and_the_others_get_it() -> None:
    async with smtp_server() as post:
        post.rcpt = ["550 unknown"]
        assert "refused ada@example.org; the others got it" in await refused(mail(post.port))
        post.rcpt = ["550 unknown", "550 unknown"]
        assert "refused: " in await refused(mail(post.port))
    assert [each.rcpt_tos for each in post.envelopes] == [["bob@example.org"]]


@pytest.mark.parametrize("address", ["a@b\r\nRCPT TO:<c@d>", "a b@c", "a@b, c@d", "<a@b>", "a@b>", "", "ü@b"])
async def test_what_is_no_mail_address_is_not_sent_to(address: str) -> None:
    async with smtp_server() as post:
        assert "no mail address" in await refused(mail(post.port, to=(address,)))
        assert "no mail address" in await refused(mail(post.port, sender=address))
    assert post.mails == []


async def test_nothing_in_a_message_makes_another_mail_header() -> None:
    nasty = Message.broken_off(NASTY, Exception(f".\r\nQUIT\r\n{NASTY}\n.\n"), Commit("1", NASTY, NASTY), LINK)
    async with smtp_server() as post:
        await mail(post.port).send(nasty)
    [sent] = post.mails
    assert sent["Bcc"] is None and "\n" not in sent["Subject"]
    assert post.envelopes[0].rcpt_tos == ["ada@example.org", "bob@example.org"]
    assert sent.get_content().rstrip().endswith(LINK)


@pytest.mark.parametrize("words", [b"", b"220-hello\r\n"])
async def test_a_mail_server_that_never_comes_to_a_point_is_given_up(words: bytes) -> None:
    async with talkative_server(words) as port:
        assert "(2 tries)" in await refused(mail(port, timeout=0.5, pauses=(0,)))


async def test_a_mail_server_that_never_ends_does_not_keep_a_process() -> None:
    program = (
        "import asyncio, sys\n"
        "from tests.report.test_venues import DONE, mail\n"
        "from toto.report.venues import VenueFailed\n"
        "try: asyncio.run(mail(int(sys.argv[1]), timeout=0.5, pauses=()).send(DONE))\n"
        "except VenueFailed: print('given up')\n"
    )
    async with talkative_server(b"220-hello\r\n") as port:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", program, str(port)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, "given up\n"), done.stderr


# Who is notified


MACHINES = {"a": ["team-a"], "b": ["team-a", "team-b"], "c": []}
FLEET = ["ops", "team-b"]


@pytest.mark.parametrize(
    ("origin", "named", "expected"),
    [
        ("push", [], Audience((), "Ada@Example.org", {"team-a": {"a", "b"}, "team-b": None, "ops": None})),
        ("schedule", [], Audience((), "", {"team-a": {"a", "b"}, "team-b": None, "ops": None})),
        ("cli", [], Audience((), "", {"team-a": {"a", "b"}, "team-b": None, "ops": None})),
        ("flying-monkey", [], Audience((), "", {"team-a": {"a", "b"}, "team-b": None, "ops": None})),
        ("ui", [], Audience((), "", {"team-a": {"a", "b"}, "team-b": {"b"}})),
        ("notebook", ["me", "team-a", "me"], Audience(("me", "team-a"), "", {"team-b": {"b"}})),
    ],
)
def test_the_result_goes_to_where_the_run_came_from(origin: str, named: list[str], expected: Audience) -> None:
    assert venues_for(origin, "Ada@Example.org", MACHINES, FLEET, named, ["example.org"]) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("committer", "allowed", "written"),
    [
        ("ada@example.org", ["example.org"], True),
        ("ada@example.org", ["ada@example.org"], True),
        ("bob@example.org", ["ada@example.org"], False),
        ("ada@sub.example.org", ["example.org"], False),
        ("ada@notexample.org", ["example.org"], False),
        ("ada@example.org", [], False),
        ("", ["example.org"], False),
        ("example.org", ["example.org"], False),
        ("a@b@example.org", ["example.org"], False),
        ("x\nBcc: y@example.org", ["example.org"], False),
        ("ada@example.org, x@y", ["example.org", "y"], False),
    ],
)
def test_only_a_pusher_who_is_one_of_us_is_written_to(committer: str, allowed: list[str], written: bool) -> None:
    assert bool(venues_for("push", committer, {}, [], [], allowed).mail) is written
