"""What a machine signs by its ssh host key: who it is when it asks toto, and what it reports.

The namespaces keep the signatures apart: none of them is one of a document, or of a login.
"""

import json
import re
from typing import Final

ASK: Final = "ask@toto"
REPORT: Final = "report@toto"
CHALLENGE: Final = re.compile(r"[A-Za-z0-9_-]{16,128}")


def text(repo: str, machine: str, challenge: str) -> bytes:
    """What a machine signs to prove that it is `machine` of `repo`: no more of it than the challenge is toto's."""
    return json.dumps({"repo": repo, "machine": machine, "challenge": challenge}, sort_keys=True).encode()
