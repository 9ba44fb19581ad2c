"""Venues: decides who is notified of a run, and sends messages by Slack, mail, a webhook or ntfy.

`toto.report.message` writes the message, `toto.report.notified` decides whether it is news to a venue, and `blocks/`
stores addresses and secrets. A message goes only to the configured address: toto follows no redirect and uses no
proxy, .netrc or cookie.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import smtplib
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate
from typing import Final, Literal, TypeAlias
from urllib.parse import SplitResult, urlsplit

import httpx

from toto.base import process
from toto.base.errors import TotoError
from toto.infra_repo.settings import is_mail_address
from toto.report.message import SLACK, Message, State, one_line

Origin: TypeAlias = Literal["push", "schedule", "ui", "cli", "notebook", "flying-monkey"]
Security: TypeAlias = Literal["starttls", "tls", "none"]

_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_LAMP: Final[dict[State, str]] = {"failed": "🔴", "partial": "🟠", "done": "🟢", "recovered": "🟢"}


class VenueFailed(TotoError):
    """A venue could not be notified. `target` is its name. Its address and secrets are not in the message."""


class _Passing(Exception):
    """A failure that may be gone at the next try."""


@dataclass(frozen=True)
class Audience:
    """Who is notified of a run.

    `asked` are the venues that are notified in any case, because the run's starter named them. So is the pusher, at the
    address `mail` ("" for nobody). `listening` are venues that only get news: about these targets, or about all (None).
    """

    asked: tuple[str, ...] = ()
    mail: str = ""
    listening: Mapping[str, Collection[str] | None] = field(default_factory=dict)


def venues_for(
    origin: Origin,
    committer: str,
    machines: Mapping[str, Sequence[str]],
    fleet: Sequence[str],
    named: Sequence[str],
    mail_pusher: Sequence[str],
) -> Audience:
    """Who is notified of a run.

    A push notifies its pusher and the fleet's venues, a scheduled run the fleet's venues, a run from the UI or a
    notebook the `named` venues. Each machine's venues are notified of that machine.

    `machines` has each machine's venues. `committer` is the mail address in the commit. Toto only writes to it when
    `mail_pusher` has it or its domain, since anyone can put anyone's address into a commit.
    """
    listening: dict[str, set[str] | None] = {}
    for machine, names in machines.items():
        for name in names:
            of = listening.setdefault(name, set())
            assert of is not None
            of.add(machine)
    if origin in ("push", "cli", "schedule", "flying-monkey"):
        listening |= dict.fromkeys(fleet)
    address = committer.lower()
    welcome = is_mail_address(address) and {address, address.partition("@")[2]} & set(mail_pusher)
    asked = tuple(dict.fromkeys(named))
    return Audience(
        asked,
        committer if origin == "push" and welcome else "",
        {name: of for name, of in listening.items() if name not in asked},
    )


@dataclass(frozen=True, kw_only=True)
class Venue(ABC):
    """A place that messages go to.

    One try takes at most `timeout` seconds. A failure that may pass is retried after each of `pauses` (seconds).
    """

    name: str
    timeout: float = 15
    pauses: tuple[float, ...] = (1, 5)

    async def send(self, message: Message) -> None:
        """Send a message. Raises `VenueFailed`, at the latest after (tries × timeout + pauses) seconds."""
        why = ""
        for pause in (0, *self.pauses):
            await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(self.timeout):
                    return await self.attempt(message)
            except TimeoutError:
                why = f"it did not answer within {self.timeout:g} s"
            except _Passing as error:
                why = str(error)
        raise self.failed(f"{why} ({len(self.pauses) + 1} tries)")

    @abstractmethod
    async def attempt(self, message: Message) -> None:
        """Send a message once. Raises `VenueFailed`, or `_Passing` for a failure that may be gone at the next try."""

    @property
    @abstractmethod
    def secrets(self) -> tuple[str, ...]:
        """The texts that no error message may show."""

    def failed(self, why: str, hint: str | None = None) -> VenueFailed:
        return VenueFailed(self._masked(why), target=self.name, hint=hint)

    def passing(self, why: object) -> _Passing:
        return _Passing(self._masked(str(why)))

    def _masked(self, text: str) -> str:
        secrets = sorted((secret for secret in self.secrets if len(secret) > 3), key=len, reverse=True)
        return one_line(process.mask(text, secrets))


@dataclass(frozen=True, kw_only=True)
class HttpVenue(Venue):
    """A venue that is notified by a POST. Its address is a secret, since everybody who knows it can post there."""

    url: str = field(repr=False)

    @property
    def secrets(self) -> tuple[str, ...]:
        parts = http_address(self.url)
        return (self.url, parts.path.strip("/"), parts.query, *parts.path.split("/")) if parts else (self.url,)

    async def _post(self, body: bytes, headers: Mapping[str, str]) -> None:
        place = self._place()
        request = httpx.Request(
            "POST",
            self.url,
            content=body,
            headers={"User-Agent": "toto", **headers},
            extensions={"timeout": httpx.Timeout(self.timeout).as_dict()},
        )
        try:
            # The transport alone: httpx's client writes the address of each request to the log.
            async with httpx.AsyncHTTPTransport(verify=ssl.create_default_context()) as transport:
                answer = await transport.handle_async_request(request)
                said = b""
                async for chunk in answer.aiter_raw():
                    said += chunk
                    if len(said) > 1000:
                        break
                await answer.aclose()
        except (httpx.HTTPError, OSError) as error:
            raise self.passing(f"{place} cannot be reached: {error or type(error).__name__}") from None
        if answer.is_success:
            return
        why = f"{place} answered {answer.status_code}: {said[:300].decode(errors='replace')}".rstrip(": ")
        if answer.is_redirect:
            raise self.failed(why, "give it the address that it leads to: redirects are not followed")
        if answer.is_server_error or answer.status_code in (408, 425, 429):
            raise self.passing(why)
        raise self.failed(why, f"check the address and the secret in its block, {self.name}")

    def _place(self) -> str:
        parts = http_address(self.url)
        if parts is None:
            raise self.failed("its address is no http(s) address, or has a password in it", "fix its block")
        return f"{parts.scheme}://{parts.netloc}"


def http_address(url: str) -> SplitResult | None:
    """The parts of an http(s) address; None for any other text, and for an address with a user or password in it."""
    try:
        parts = urlsplit(url)
        fine = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and "@" not in parts.netloc
            and url.isascii()
            and url.isprintable()
            and " " not in url
            and parts.port != 0
        )
    except ValueError:
        return None
    return parts if fine else None


@dataclass(frozen=True, kw_only=True)
class Slack(HttpVenue):
    """An incoming webhook of Slack, or of a program like it (Mattermost, Rocket.Chat, Discord's /slack)."""

    async def attempt(self, message: Message) -> None:
        title = SLACK.bold(SLACK.escape(message.title))
        body = {
            "text": f"{_LAMP[message.state]} {title}\n{message.text(SLACK)}",
            "unfurl_links": False,
            "unfurl_media": False,
        }
        await self._post(json.dumps(body).encode(), {"Content-Type": "application/json"})


@dataclass(frozen=True, kw_only=True)
class Webhook(HttpVenue):
    """Any program that takes JSON. `Idempotency-Key` is the same for each try of one message.

    With a `secret`, the body is signed as GitHub signs its webhooks: `X-Hub-Signature-256: sha256=` and its HMAC.
    """

    secret: str = field(default="", repr=False)

    @property
    def secrets(self) -> tuple[str, ...]:
        return (*super().secrets, self.secret)

    async def attempt(self, message: Message) -> None:
        body = json.dumps(message.as_json()).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": message.id}
        if self.secret:
            digest = hmac.new(self.secret.encode(), body, hashlib.sha256).hexdigest()
            headers["X-Hub-Signature-256"] = f"sha256={digest}"
        await self._post(body, headers)


@dataclass(frozen=True, kw_only=True)
class Ntfy(HttpVenue):
    """A topic of ntfy: a push message on a phone. A target that could not be reverted comes through at night."""

    token: str = field(default="", repr=False)

    @property
    def secrets(self) -> tuple[str, ...]:
        return (*super().secrets, self.token)

    async def attempt(self, message: Message) -> None:
        priority = 5 if message.stuck else {"failed": 4, "partial": 3, "done": 2, "recovered": 3}[message.state]
        tag = {"failed": "rotating_light", "partial": "warning"}.get(message.state, "white_check_mark")
        headers = {"Title": _header(message.title), "Priority": str(priority), "Tags": tag}
        if http_address(message.link):
            headers["Click"] = message.link
        if self.token:
            if not (self.token.isascii() and self.token.isprintable()):
                raise self.failed("its token has characters that no token has", "fix its block")
            headers["Authorization"] = f"Bearer {self.token}"
        await self._post(_within(message.text(), 4000, message.footer()), headers)


def _header(text: str) -> str:
    """Text as the value of an HTTP header (RFC 2047, as ntfy reads it)."""
    return text if text.isascii() else f"=?utf-8?B?{base64.b64encode(text.encode()).decode()}?="


def _within(text: str, size: int, footer: str) -> bytes:
    """Text as at most `size` bytes, with its whole footer: ntfy turns anything longer into a file."""
    data, end = text.encode(), f" …\n\n{footer}".encode()
    return data if len(data) <= size else data[: size - len(end)].decode(errors="ignore").encode() + end


@dataclass(frozen=True, kw_only=True)
class Mail(Venue):
    """Mail through an SMTP server: with STARTTLS, with TLS from the start, or in the clear on this machine."""

    host: str
    port: int = 0
    security: Security = "starttls"
    sender: str
    to: tuple[str, ...]
    user: str = ""
    password: str = field(default="", repr=False)

    @property
    def secrets(self) -> tuple[str, ...]:
        return (
            self.password,
            *(
                base64.b64encode(each.encode()).decode()  # as it is sent
                for each in (self.password, f"\0{self.user}\0{self.password}")
            ),
        )

    async def attempt(self, message: Message) -> None:
        if wrong := [each for each in (self.sender, *self.to) if not is_mail_address(each)] or not self.to:
            raise self.failed(f"no mail address: {wrong}" if self.to else "nobody to send to", "fix its block")
        if self.security == "none" and self.host not in _LOOPBACK:
            raise self.failed("without TLS mail goes to this machine only", "choose starttls or tls in its block")
        try:
            refused = await _abandonable(lambda: self._deliver(self.mail(message)))
        except smtplib.SMTPRecipientsRefused as error:
            raise self._refused([answer for answer, _ in error.recipients.values()], error.recipients) from None
        except smtplib.SMTPResponseException as error:
            raise self._refused([error.smtp_code], error.smtp_error) from None
        except (smtplib.SMTPNotSupportedError, ssl.SSLCertVerificationError) as error:
            raise self.failed(
                f"{self.host}: {error}", "check the server, the port and `security` in its block"
            ) from None
        except (smtplib.SMTPException, OSError) as error:
            raise self.passing(f"{self.host} cannot be reached: {error or type(error).__name__}") from None
        if refused:
            raise self.failed(f"{self.host} refused {', '.join(refused)}; the others got it")

    def _refused(self, codes: Sequence[int], said: object) -> Exception:
        why = f"{self.host} refused: {said.decode(errors='replace') if isinstance(said, bytes) else said}"
        if all(400 <= code < 500 for code in codes):
            return self.passing(why)
        return self.failed(why, "check the addresses, user and password in its block")

    def mail(self, message: Message) -> EmailMessage:
        """The message as a mail."""
        mail = EmailMessage(policy=SMTP)
        mail["From"], mail["To"], mail["Subject"] = self.sender, ", ".join(self.to), message.title
        mail["Date"], mail["Message-ID"] = formatdate(), f"<{message.id}@{self.sender.partition('@')[2]}>"
        mail["Auto-Submitted"] = "auto-generated"  # so that no out-of-office reply comes back
        mail.set_content(message.text(), cte="quoted-printable")
        return mail

    def _deliver(self, mail: EmailMessage) -> Sequence[str]:
        tls = ssl.create_default_context()
        port = self.port or {"starttls": 587, "tls": 465, "none": 25}[self.security]
        client = (
            smtplib.SMTP_SSL(self.host, port, timeout=self.timeout, context=tls)
            if self.security == "tls"
            else smtplib.SMTP(self.host, port, timeout=self.timeout)
        )
        try:
            if self.security == "starttls":
                client.starttls(context=tls)  # raises when the server does not offer it
            if self.user:
                client.login(self.user, self.password)
            refused = list(client.send_message(mail, self.sender, self.to))
            client.putcmd("QUIT")  # do not wait for its answer: the mail is sent
            return refused
        finally:
            client.close()


async def _abandonable(work: Callable[[], Sequence[str]]) -> Sequence[str]:
    """Run `work` in a thread that nothing waits for, not even the end of the process: smtplib cannot be cancelled."""
    loop = asyncio.get_running_loop()
    end: asyncio.Future[Sequence[str]] = loop.create_future()

    def finish(result: Sequence[str] | None, error: BaseException | None) -> None:
        if end.done():
            return
        if error is not None:
            end.set_exception(error)
        else:
            end.set_result(result or ())

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="mail", daemon=True).start()
    return await end
