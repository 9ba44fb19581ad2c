"""What a Prometheus needs."""

import json

from toto.cli.common import Repos
from toto.cli.verbs import Verbs
from toto.git_host import host as git_host
from toto.metrics import machines, token

verbs = Verbs()
metrics = verbs.group("metrics")


@metrics.verb("token")
def secret() -> int:
    """Print the token by which it reads /metrics: a secret."""
    print(token.file().read_text())
    return 0


@metrics.verb("targets")
def targets(repos: Repos) -> int:
    """Print the machines, for a file of its file_sd."""
    print(json.dumps(machines.targets(git_host.infra_repos(repos)), indent=1))
    return 0
