"""The environment without git's variables: in a hook they name its repository and quarantine, which is nobody else's.

It imports next to nothing, for the git host's logins.
"""

import os
from collections.abc import Collection


def without_git(kept: Collection[str] = ()) -> dict[str, str]:
    """This process's environment without any GIT_* but those that are `kept`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in kept}
