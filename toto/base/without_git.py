"""The environment without git's variables: in a hook they point at the hook's own repository and quarantine.

This module imports very little, because every login to the git host loads it.
"""

import os
from collections.abc import Collection


def without_git(kept: Collection[str] = ()) -> dict[str, str]:
    """This process's environment without its GIT_* variables, except those in `kept`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in kept}
