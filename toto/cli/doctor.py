"""What toto lacks on this machine."""

import json
from dataclasses import asdict
from typing import Annotated

from typer import Option

from toto.base import paths
from toto.cli.common import Home, Repos
from toto.cli.verbs import Verbs
from toto.doctor import CHECKS, findings

verbs = Verbs()


@verbs.verb("doctor")
async def doctor(
    home: Home, repos: Repos, as_json: Annotated[bool, Option("--json", help="print the findings as JSON")] = False
) -> int:
    """Tell what toto lacks on this machine, and what mends it.

    The exit status is 1 when it does not work without.
    """
    found = await findings.examine(findings.Toto(paths.state_home(), home, repos), CHECKS)
    print(json.dumps([asdict(each) for each in found], indent=1) if as_json else findings.text(found))
    return int(any(each.status == "missing" for each in found))
