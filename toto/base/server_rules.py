"""What the server allows, in `server.toml` in toto's state: a file of the administrator's, which no push changes.

Every rule has a default, so the file may be missing. It is read each time that a rule is needed.
"""

import tomllib
from typing import Annotated, Final

from pydantic import Field, StrictBool, StrictInt, StrictStr, ValidationError

from toto.base import paths
from toto.base.errors import InputError
from toto.base.model import Model, explain

FILE: Final = "server.toml"
_SYSTEM: Final = r"^[a-z0-9_]+-[a-z0-9]+$"


class Runs(Model):
    """How many runs may be at work at once; further ones wait."""

    per_repo: Annotated[StrictInt, Field(ge=1, le=1000)] = 8
    """runs of one repository"""
    per_pusher: Annotated[StrictInt, Field(ge=1, le=1000)] = 4
    """runs that one user's pushes have started, of all repositories"""


class Push(Model):
    """What a push may bring."""

    size: Annotated[StrictInt, Field(ge=1_000_000)] = 1_000_000_000
    """bytes of a push"""
    files: Annotated[StrictInt, Field(ge=1)] = 100_000
    """files of a commit that is planned, rehearsed or deployed"""
    unpacked: Annotated[StrictInt, Field(ge=1_000_000)] = 4_000_000_000
    """bytes of all files of such a commit"""


class Evaluation(Model):
    """What an evaluation may do."""

    builds: Annotated[StrictInt, Field(ge=0, le=1_000_000)] = 50
    """derivations that one evaluation may have built (import from derivation); 0 forbids it"""


class Store(Model):
    """The nix store of this server."""

    free: Annotated[StrictInt, Field(ge=0)] = 5_000_000_000
    """bytes of its disk that are to be free: every night garbage is collected until they are"""


class Builder(Model):
    """A machine that builds for this server: docs/builders.md says how to make one."""

    address: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:-]*$")]
    """its host name or IP address"""
    port: Annotated[StrictInt, Field(ge=1, le=65_535)] = 22
    """where its sshd listens"""
    user: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] = "builder"
    """as whom toto logs in; nix trusts that user there"""
    host_key: Annotated[StrictStr, Field(pattern=r"^(ssh|ecdsa|sk)-[A-Za-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\n\r]*)?$")]
    """the host key by which it is known, such as `ssh-ed25519 AAAA…`; none is ever learnt"""
    systems: Annotated[tuple[Annotated[StrictStr, Field(pattern=_SYSTEM)], ...], Field(min_length=1)]
    """the platforms that it builds for, such as `aarch64-linux`"""
    jobs: Annotated[StrictInt, Field(ge=1, le=1000)] = 1
    """builds at once"""
    speed: Annotated[StrictInt, Field(ge=1, le=1000)] = 1
    """of several with room, the fastest for its load gets a build"""
    features: tuple[Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]+$")], ...] = ()
    """what derivations may require of it, such as `big-parallel` or `kvm`"""


class FleetBuilder(Model):
    """A machine of a fleet that may build for this server: its manifest says the rest (docs/builders.md)."""

    host_key: Annotated[StrictStr, Field(pattern=r"^(ssh|ecdsa|sk)-[A-Za-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\n\r]*)?$")]
    """the host key by which it is known; a manifest with a different one describes no builder"""
    user: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] = "builder"
    """as whom toto logs in; nix trusts that user there"""


class ServerRules(Model):
    """Everything in `server.toml`."""

    resume_button: StrictBool = False
    """whether the Resume button in the UI approves too; toto does not know who presses it"""
    shared_blocks: StrictStr | None = None
    """the one repository that also uses the blocks called `toto`, and those called like its terraform roots"""
    runs: Runs = Runs()
    push: Push = Push()
    evaluation: Evaluation = Evaluation()
    store: Store = Store()
    builders: dict[Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")], Builder] = Field(
        default_factory=dict
    )
    """machines that build for this server, by their names; of the state of who runs the nix daemon"""
    fleet_builders: dict[
        Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*$")], FleetBuilder
    ] = Field(default_factory=dict)
    """machines with `role: builder` that may build for this server, by `REPO/MACHINE`; of the same state"""
    most: dict[StrictStr, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """the most that a `toto.toml` may set a number to, by the setting's name, such as `nix.build_timeout`"""


def load() -> ServerRules:
    """The rules of this server. Raises `InputError` with all mistakes in the file."""
    file = paths.state_home() / FILE
    try:
        return ServerRules.model_validate(tomllib.loads(file.read_text()))
    except FileNotFoundError:
        return ServerRules()
    except ValidationError as error:
        wrong = [f"{FILE}: {'.'.join(map(str, where))}: {what}" for where, what in explain(error, ServerRules)]
        raise InputError("\n".join(wrong), hint=f"fix {file}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"cannot be read: {error}", target=str(file)) from None
