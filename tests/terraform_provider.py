"""A small real terraform provider, `demo`, of two resources that are files.

A `demo_file` is a file of a given path. A `demo_volume` is a file of its own name, its id, in the folder `pool`: each
that is created is another one, and it can be imported by its id.

Content that begins with "fail" cannot be written; a file beside which there is a NAME.locked cannot be deleted. Version
2.0.0, where it is installed, has a newer schema of the volume's state.
"""

import platform
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tf import runner, types  # type: ignore[import-untyped]
from tf.iface import Provider, Resource  # type: ignore[import-untyped]
from tf.schema import Attribute, Schema  # type: ignore[import-untyped]

SOURCE = "toto.test/toto/demo"
ROOT = Path(__file__).parent.parent


class File(Resource):  # type: ignore[misc]
    """A file: another path is another file, its content may change."""

    def __init__(self, provider: Provider) -> None:
        pass

    @classmethod
    def get_name(cls) -> str:
        return "file"

    @classmethod
    def get_schema(cls) -> Schema:
        return Schema(
            attributes=[
                Attribute("path", types.String(), required=True, requires_replace=True),
                Attribute("content", types.String(), required=True),
                Attribute("token", types.String(), optional=True, sensitive=True),
                Attribute("size", types.Number(), computed=True),
            ]
        )

    def create(self, ctx: Any, planned: dict[str, Any]) -> dict[str, Any] | None:
        return _write(ctx, planned)

    def update(self, ctx: Any, current: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any] | None:
        return _write(ctx, planned) or current

    def read(self, ctx: Any, current: dict[str, Any]) -> dict[str, Any] | None:
        path = Path(current["path"])
        return current | _read(path) if path.exists() else None

    def delete(self, ctx: Any, current: dict[str, Any]) -> None:
        if Path(f"{current['path']}.locked").exists():
            ctx.diagnostics.add_error("cannot delete the file", f"{current['path']} is locked")
        else:
            Path(current["path"]).unlink(missing_ok=True)

    def plan(self, ctx: Any, current: dict[str, Any] | None, planned: dict[str, Any]) -> dict[str, Any]:
        return planned | ({"size": len(planned["content"])} if isinstance(planned["content"], str) else {})


class Volume(Resource):  # type: ignore[misc]
    """A file with a name of its own: what is created is new, and what is deleted is gone."""

    version = 0

    def __init__(self, provider: Provider) -> None:
        pass

    @classmethod
    def get_name(cls) -> str:
        return "volume"

    @classmethod
    def get_schema(cls) -> Schema:
        return Schema(
            version=cls.version,
            attributes=[
                Attribute("id", types.String(), computed=True),
                Attribute("pool", types.String(), required=True, requires_replace=True),
                Attribute("content", types.String(), required=True),
            ],
        )

    def create(self, ctx: Any, planned: dict[str, Any]) -> dict[str, Any] | None:
        id = f"{planned['pool']}/{uuid.uuid4()}"
        return planned | {"id": id} if _write(ctx, {"path": id, "content": planned["content"]}) else None

    def update(self, ctx: Any, current: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any] | None:
        id = current["id"]
        return planned | {"id": id} if _write(ctx, {"path": id, "content": planned["content"]}) else current

    def read(self, ctx: Any, current: dict[str, Any]) -> dict[str, Any] | None:
        path = Path(current["id"])
        return current | {"content": path.read_text()} if path.exists() else None

    def import_(self, ctx: Any, id: str) -> dict[str, Any] | None:
        if not Path(id).exists():
            ctx.diagnostics.add_error("there is no such volume", id)
            return None
        return {"id": id, "pool": str(Path(id).parent), "content": Path(id).read_text()}

    def delete(self, ctx: Any, current: dict[str, Any]) -> None:
        File.delete(self, ctx, {"path": current["id"]})

    def upgrade(self, ctx: Any, version: int, old: dict[str, Any]) -> dict[str, Any]:
        return old


def _write(ctx: Any, planned: dict[str, Any]) -> dict[str, Any] | None:
    path = Path(planned["path"])
    if planned["content"].startswith("fail"):
        ctx.diagnostics.add_error("cannot write the file", f"no room for {planned['content']!r} in {path}")
        return None
    path.write_text(planned["content"])
    return planned | _read(path)


def _read(path: Path) -> dict[str, Any]:
    content = path.read_text()
    return {"content": content, "size": len(content)}


class Demo(Provider):  # type: ignore[misc]
    """The provider; it has nothing to configure."""

    def get_model_prefix(self) -> str:
        return "demo_"

    def full_name(self) -> str:
        return SOURCE

    def get_provider_schema(self, diags: Any) -> Schema:
        return Schema()

    def validate_config(self, diags: Any, config: Any) -> None:
        pass

    def configure_provider(self, diags: Any, config: Any) -> None:
        pass

    def get_data_sources(self) -> list[Any]:
        return []

    def get_resources(self) -> list[Any]:
        return [File, Volume]


def install(folder: Path, versions: Sequence[str] = ("1.0.0",)) -> Path:
    """Install it under `folder`, in a mirror, and return the terraform CLI's configuration that finds it there."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    for version in versions:
        program = folder / "mirror" / SOURCE / version / f"linux_{machine}" / f"terraform-provider-demo_v{version}"
        program.parent.mkdir(parents=True)
        program.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"from tests.terraform_provider import main\nmain({int(version[0]) - 1})\n"
        )
        program.chmod(0o755)
    configuration = folder / "terraform.rc"
    configuration.write_text(
        f'provider_installation {{\n  filesystem_mirror {{\n    path = "{folder}/mirror"\n  }}\n}}\n'
    )
    return configuration


def needs(configuration: Path) -> list[Path]:
    """The folders that terraform's cell must see for the provider that `install` has put beside its configuration."""
    return [configuration.parent / "mirror", Path(sys.prefix), Path(sys.base_prefix).resolve(), ROOT / "tests"]


def main(schema: int) -> None:
    """Serve terraform, as it starts its providers. `schema` is the version of a volume's state."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as providers do: terraform itself stops them
    Volume.version = schema
    runner.run_provider(Demo(), [sys.argv[0]])
