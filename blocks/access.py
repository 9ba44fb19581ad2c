"""Blocks with the credentials that toto logs in with: ssh, terraform, Kubernetes."""

import re
from abc import ABC
from pathlib import Path
from typing import ClassVar, Final, Self

import yaml
from prefect.types import SecretDict
from pydantic import Field, SecretStr, field_validator

from blocks.base import TotoBlock
from blocks.names import names, own_or_shared, used
from toto.base import files
from toto.base.errors import InputError
from toto.cell.relay import Endpoint

READ_ONLY: Final = "-read-only"  # the end of the name of a block for runs that will not deploy


class AccessBlock(TotoBlock, ABC):
    """A block that also works unsaved, with its defaults."""

    @classmethod
    async def of_repo(cls, repo: Path, target: str | None = None) -> Self:
        """The block of an infra repo, or of one of its targets: the first that is saved of `names`, else the defaults.

        Raises `InputError`.
        """
        return await cls.saved_of(repo, target) or cls()

    @classmethod
    async def saved_of(cls, repo: Path, target: str | None = None, suffix: str = "") -> Self | None:
        """As `of_repo`, but None where none is saved. `suffix` is at the end of each name: `READ_ONLY` or nothing."""
        for name in names(repo, target):
            if (block := await cls.saved(f"{name}{suffix}")) is not None:
                used(repo, name)
                return block
        return None


class SshIdentity(AccessBlock):
    """A private ssh key by which toto logs in to machines. Without one, toto uses a key of its own."""

    _block_type_name: ClassVar[str] = "Toto ssh identity"

    private_key: SecretStr = Field(
        default=SecretStr(""),
        title="Private key",
        description="The key itself, from its BEGIN to its END line. Leave it empty to name a file instead.",
    )
    path: str = Field(default="", title="Path", description="The file of the key on toto, when it is kept there.")

    @field_validator("private_key")
    @classmethod
    def _is_a_key(cls, key: SecretStr) -> SecretStr:
        text = key.get_secret_value().replace("\r\n", "\n").strip()
        if text and not re.fullmatch(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----\n.*\n-----END [A-Z ]*PRIVATE KEY-----", text, re.DOTALL
        ):
            raise ValueError("should be a private key, with its BEGIN and END lines each on a line of its own")
        return SecretStr(f"{text}\n" if text else "")

    def file(self, directory: Path) -> Path | None:
        """The file of the key: the block's path, or a new file in `directory`; None for toto's own key."""
        if text := self.private_key.get_secret_value():
            return files.write(directory / "identity", text)
        return Path(self.path).expanduser() if self.path else None


class Variables(AccessBlock, ABC):
    """Environment variables, and what is reached with them."""

    variables: SecretDict = Field(
        default_factory=lambda: SecretDict({}),
        title="Environment variables",
        description='As JSON: {"HCLOUD_TOKEN": "…", "AWS_SECRET_ACCESS_KEY": "…", "TF_VAR_password": "…"}',
    )

    endpoints: list[str] = Field(
        default_factory=list,
        title="Endpoints",
        description="What is reached on private networks or on toto itself, as host:port: 192.168.7.5:8006.",
    )

    @field_validator("endpoints")
    @classmethod
    def _are_endpoints(cls, endpoints: list[str]) -> list[str]:
        for each in endpoints:
            try:
                Endpoint.parse(each)
            except InputError as error:
                raise ValueError(f"{error.message}: write host:port, such as 192.168.7.5:8006") from None
        return endpoints

    @field_validator("variables")
    @classmethod
    def _are_variables(cls, variables: SecretDict) -> SecretDict:
        for name, value in variables.get_secret_value().items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not isinstance(value, str) or "\0" in value:
                raise ValueError("should be names of environment variables, each with a text as its value")
        return variables

    def environment(self) -> dict[str, str]:
        """The variables by name. Every value is a secret."""
        return dict(self.variables.get_secret_value())

    def reached(self) -> list[Endpoint]:
        """The endpoints, parsed."""
        return [Endpoint.parse(each) for each in self.endpoints]


class TerraformCredentials(Variables):
    """Environment variables for terraform, with which its providers and its backend log in.

    The servers in PG_CONN_STR and TF_HTTP_ADDRESS are reached without being endpoints.
    """

    _block_type_name: ClassVar[str] = "Toto terraform credentials"


class JobAccess(Variables):
    """What jobs may use and reach that name this block in `ACCESS`."""

    _block_type_name: ClassVar[str] = "Toto job access"

    kubeconfig: SecretStr = Field(
        default=SecretStr(""),
        title="Kubeconfig",
        description="Its text: `kubectl config view --raw --flatten --minify`. A server on a private network has to be "
        "among the endpoints.",
    )

    @classmethod
    async def named(cls, repo: Path, name: str) -> Self:
        """The block that a repo means by a name. Raises `InputError` when there is none."""
        candidates = own_or_shared(repo, name)
        for each in candidates:
            if (block := await cls.saved(each)) is not None:
                used(repo, each)
                return block
        raise InputError(
            "there is no access of this name for jobs",
            target=name,
            hint=f"save a block `{cls._block_type_name}` as {' or '.join(candidates)} in the UI, under Blocks",
        )


class KubeAccess(AccessBlock):
    """A Kubernetes cluster that helm deploys to. Without this block, helm uses the kubeconfig of toto's user."""

    _block_type_name: ClassVar[str] = "Toto kube access"

    kubeconfig: SecretStr = Field(
        default=SecretStr(""),
        title="Kubeconfig",
        description="Its text: `kubectl config view --raw --flatten --minify`. Leave it empty to name a file instead.",
    )
    path: str = Field(default="", title="Path", description="The file of the kubeconfig on toto, when it is there.")
    context: str = Field(default="", title="Context", description="The context to use; empty: the current one.")

    @field_validator("kubeconfig")
    @classmethod
    def _is_a_kubeconfig(cls, config: SecretStr) -> SecretStr:
        text = config.get_secret_value().strip()
        try:
            fine = not text or "clusters" in yaml.safe_load(text)
        except (yaml.YAMLError, TypeError):
            fine = False
        if not fine:
            raise ValueError("should be a kubeconfig: YAML or JSON with its `clusters`")
        return SecretStr(f"{text}\n" if text else "")

    def file(self, directory: Path) -> Path | None:
        """The file of the kubeconfig: the block's path, or a new file in `directory`; None for kubectl's own.

        Raises `InputError` when the kubeconfig does not have the context.
        """
        path = Path(self.path).expanduser() if self.path else None
        text = self.kubeconfig.get_secret_value()
        if self.context:
            config = yaml.safe_load(text or (path.read_text() if path else "{}")) or {}
            known = [str(each["name"]) for each in config.get("contexts") or ()]
            if self.context not in known:
                raise InputError(
                    f"there is no context {self.context!r} in the kubeconfig",
                    target=f"block {self.get_block_type_slug()}",
                    hint=f"it has {', '.join(known) or 'none'}; fix the block in the UI, under Blocks",
                )
            text = yaml.safe_dump(config | {"current-context": self.context})
        return files.write(directory / "kubeconfig", text) if text else path
