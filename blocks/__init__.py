"""Prefect blocks: what belongs to the server, secrets above all, as saved, typed settings that also work unsaved.

`prefect block register -m blocks` makes their forms known to the UI (toto's start does it). A secret is kept
encrypted in Prefect's database, and shows in no log, repr or artifact.
"""

from blocks.access import KubeAccess, SshIdentity, TerraformCredentials
from blocks.venues import MailVenue, NtfyVenue, SlackVenue, WebhookVenue

__all__ = ["KubeAccess", "MailVenue", "NtfyVenue", "SlackVenue", "SshIdentity", "TerraformCredentials", "WebhookVenue"]
