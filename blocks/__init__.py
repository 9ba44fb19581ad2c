"""Prefect blocks: typed settings and secrets of the server. They are saved in Prefect, and also work unsaved.

`prefect block register -m blocks` registers their forms in the UI; toto does so at each start. Secrets are encrypted in
Prefect's database and appear in no log, repr or artifact.
"""

from blocks.access import JobAccess, KubeAccess, SshIdentity, TerraformCredentials
from blocks.venues import MailVenue, NtfyVenue, SlackVenue, WebhookVenue

__all__ = [
    "JobAccess",
    "KubeAccess",
    "MailVenue",
    "NtfyVenue",
    "SlackVenue",
    "SshIdentity",
    "TerraformCredentials",
    "WebhookVenue",
]
