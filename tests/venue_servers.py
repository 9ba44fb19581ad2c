"""Servers that venues send to: HTTP that records, hangs, fails or redirects as set; SMTP with TLS and logins."""

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Request:
    """A POST as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class HttpServer:
    """Where it listens, what it got, and what it answers: (status, body) in turn, the last one again and again."""

    address: str = ""
    requests: list[Request] = field(default_factory=list)
    answers: list[tuple[int, str]] = field(default_factory=lambda: [(200, "ok")])
    location: str = ""
    hangs: threading.Event | None = None  # no answer until it is set


@contextlib.contextmanager
def http_server() -> Iterator[HttpServer]:
    """A server on loopback, for as long as the block lasts."""
    state = HttpServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.requests.append(Request(self.path, dict(self.headers), body))
            status, text = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            if state.hangs is not None:
                state.hangs.wait(60)
            with contextlib.suppress(OSError):
                self.send_response(status)
                if state.location:
                    self.send_header("Location", state.location)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        if state.hangs is not None:
            state.hangs.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-made certificate for localhost, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, private = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert, private


@dataclass
class SmtpServer:
    """Where it listens, the mail it took, and the answer to RCPT where that is not 250."""

    port: int = 0
    mails: list[EmailMessage] = field(default_factory=list)
    envelopes: list[Envelope] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    rcpt: list[str] = field(default_factory=list)

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.rcpt:
            return self.rcpt.pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        mail = message_from_bytes(envelope.content, policy=default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        self.envelopes.append(envelope)
        return "250 OK"


@contextlib.asynccontextmanager
async def smtp_server(
    pair: tuple[Path, Path] | None = None, *, tls: bool = False, password: str = ""
) -> AsyncIterator[SmtpServer]:
    """A server on loopback: plain, with STARTTLS where it has a certificate, with TLS from the start when `tls`.

    It wants the login `toto` with `password` where there is one.
    """
    state = SmtpServer()
    context = None
    if pair is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*pair)

    def login(server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: object) -> AuthResult:
        state.logins.append(mechanism)
        right = data == LoginPassword(b"toto", password.encode())
        return AuthResult(success=right, handled=right)

    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(
            state,
            loop=loop,
            tls_context=None if tls else context,
            require_starttls=context is not None and not tls,
            authenticator=login if password else None,
            auth_required=bool(password),
            auth_require_tls=False,
        ),
        "127.0.0.1",
        0,
        ssl=context if tls else None,
    )
    try:
        state.port = server.sockets[0].getsockname()[1]
        yield state
    finally:
        server.close()


@contextlib.asynccontextmanager
async def talkative_server(words: bytes) -> AsyncIterator[int]:
    """A port on loopback that says `words` again and again, or nothing at all, and never hangs up."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while not writer.is_closing():
                writer.write(words)
                await writer.drain()
                await asyncio.sleep(0.05)

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
