"""What toto lacks on this machine."""

from dataclasses import asdict

from toto.base import paths
from toto.cli.common import Home, Repos
from toto.cli.output import AsJson, emit
from toto.cli.verbs import Verbs
from toto.doctor import CHECKS, findings

verbs = Verbs()


@verbs.verb("doctor")
async def doctor(home: Home, repos: Repos, as_json: AsJson = False) -> int:
    """Tell what toto lacks on this machine, and what mends it.

    The exit status is 1 when it does not work without.
    """
    found = await findings.examine(findings.Toto(paths.state_home(), home, repos), CHECKS)
    emit("findings", [asdict(each) for each in found], findings.text(found), as_json=as_json)
    return int(any(each.status == "missing" for each in found))
