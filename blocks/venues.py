"""Blocks for venues: each gives a name in `venues` of toto.toml or machines.yaml its address and secret."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final

from pydantic import Field, SecretStr, field_validator

from blocks.base import TotoBlock
from blocks.names import own_or_shared, used
from toto.infra_repo.settings import is_mail_address, is_venue_name
from toto.report import venues
from toto.report.venues import Security, VenueFailed

PUSHER: Final = "pusher"  # the mail venue that sends pushers the result of their push


def _checked(url: SecretStr) -> SecretStr:
    text = url.get_secret_value().strip()
    if venues.http_address(text) is None:
        raise ValueError("should be an address that begins with https:// or http://, without a password in it")
    return SecretStr(text)


class VenueBlock(TotoBlock, ABC):
    """A venue, saved under the name that toto.toml and machines.yaml use."""

    @abstractmethod
    def venue(self, name: str) -> venues.Venue:
        """The sender for this venue; `name` is the block's, for messages."""


class SlackVenue(VenueBlock):
    """A channel of Slack, Mattermost, Rocket.Chat or Discord, through an incoming webhook."""

    _block_type_name: ClassVar[str] = "Toto venue: Slack"

    url: SecretStr = Field(
        title="Webhook address",
        description="Such as https://hooks.slack.com/services/T…/B…/…; everybody who knows it can post to the channel.",
    )
    _url = field_validator("url")(_checked)

    def venue(self, name: str) -> venues.Slack:
        return venues.Slack(name=name, url=self.url.get_secret_value())


class MailVenue(VenueBlock):
    """Mail. The block named `pusher` sends the result of a push to the person who pushed."""

    _block_type_name: ClassVar[str] = "Toto venue: mail"

    host: str = Field(default="localhost", title="SMTP server", description="Its host name.")
    security: Security = Field(
        default="starttls",
        title="Security",
        description="starttls (port 587), tls from the start (port 465), or none: only for a server on toto itself.",
    )
    port: int = Field(default=0, ge=0, le=65535, title="Port", description="0: the usual port for this security.")
    sender: str = Field(title="From", description="The address that mail comes from.")
    to: list[str] = Field(
        default_factory=list,
        title="To",
        description=('The addresses that mail goes to, as JSON: ["ops@example.org"]. `pusher` does not need any.'),
    )
    user: str = Field(default="", title="User", description="To log in with; empty: no login.")
    password: SecretStr = Field(default=SecretStr(""), title="Password", description="To log in with.")

    @field_validator("sender", "to")
    @classmethod
    def _are_addresses(cls, value: str | list[str]) -> str | list[str]:
        if not all(is_mail_address(each) for each in ([value] if isinstance(value, str) else value)):
            raise ValueError("should be a mail address like toto@example.org")
        return value

    def venue(self, name: str) -> venues.Mail:
        return venues.Mail(
            name=name,
            host=self.host,
            port=self.port,
            security=self.security,
            sender=self.sender,
            to=tuple(self.to),
            user=self.user,
            password=self.password.get_secret_value(),
        )


class WebhookVenue(VenueBlock):
    """Any program that takes JSON by a POST."""

    _block_type_name: ClassVar[str] = "Toto venue: webhook"

    url: SecretStr = Field(title="Address", description="The address that toto posts the JSON to.")
    secret: SecretStr = Field(
        default=SecretStr(""),
        title="Secret",
        description="Signs the body: X-Hub-Signature-256 is its HMAC, as in GitHub's webhooks. Empty: no signature.",
    )
    _url = field_validator("url")(_checked)

    def venue(self, name: str) -> venues.Webhook:
        return venues.Webhook(name=name, url=self.url.get_secret_value(), secret=self.secret.get_secret_value())


class NtfyVenue(VenueBlock):
    """A topic of ntfy, for push messages on phones."""

    _block_type_name: ClassVar[str] = "Toto venue: ntfy"

    url: SecretStr = Field(
        title="Address of the topic",
        description="Such as https://ntfy.sh/TOPIC; everybody who knows it can read and post.",
    )
    token: SecretStr = Field(default=SecretStr(""), title="Access token", description="Empty: none.")
    _url = field_validator("url")(_checked)

    def venue(self, name: str) -> venues.Ntfy:
        return venues.Ntfy(name=name, url=self.url.get_secret_value(), token=self.token.get_secret_value().strip())


KINDS: Final[tuple[type[VenueBlock], ...]] = (SlackVenue, MailVenue, WebhookVenue, NtfyVenue)


async def pusher(address: str, repo: Path) -> venues.Mail:
    """The sender for mail to a pusher: the mail venue `pusher` of the repo. Raises `VenueFailed`, `InputError`."""
    found = [await MailVenue.saved(each) for each in own_or_shared(repo, PUSHER)]
    block = next((each for each in found if each is not None), None)
    if block is None:
        raise VenueFailed(
            "there is no mail venue of this name",
            target=PUSHER,
            hint=f"save a block `Toto venue: mail` as {' or '.join(own_or_shared(repo, PUSHER))} in the UI, "
            "or leave out venues.mail_pusher",
        )
    return replace(block.venue(PUSHER), to=(address,))


async def named(name: str, repo: Path | None = None) -> list[venues.Venue]:
    """The senders for a venue name: one for each venue block that is saved under it.

    For an infra repo these are the blocks called `REPO--NAME`, and `NAME` where it may use the shared ones.
    Raises `VenueFailed` when there is none, `InputError` when a block's values are wrong.
    """
    if not is_venue_name(name):
        raise VenueFailed("is not a venue's name: use lower-case letters, digits and '-'", target=name)
    candidates = [name] if repo is None else own_or_shared(repo, name)
    for candidate in candidates:
        found = [block.venue(name) for kind in KINDS if (block := await kind.saved(candidate)) is not None]
        if found:
            if repo is not None:
                used(repo, candidate)
            return found
    raise VenueFailed(
        "there is no venue of this name",
        target=name,
        hint=f"save a block `Toto venue: …` as {' or '.join(candidates)} in the UI, under Blocks",
    )
