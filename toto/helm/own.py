"""Charts of toto's own: what a pushed chart renders to, what the cluster can do, and what is live, as helm's own text.

Helm is the only client of the cluster, since it understands everything in a kubeconfig.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from toto.helm import manifest
from toto.helm.manifest import Key, Resource

# What `helm template` prints before the templates: each file of `crds/`, under its name.
_CRDS: Final = re.compile(
    r"(?:---\n# Source: [^\n/]+/(?:charts/[^\n/]+/)*crds/.*?\n(?=---\n# Source: |\Z))+", re.DOTALL
)
_CRD: Final = "CustomResourceDefinition"

# A chart that tells what the cluster can do, for charts that are rendered without it.
CAPABILITIES: Final = {
    "Chart.yaml": "apiVersion: v2\nname: capabilities\nversion: 0.0.0\n",
    "templates/capabilities.yaml": """\
apiVersion: v1
kind: ConfigMap
metadata: {name: capabilities}
data:
  kube: {{ .Capabilities.KubeVersion.Version | quote }}
  apis: {{ toJson .Capabilities.APIVersions | quote }}
""",
}

# A chart that reads live resources: one by one where few are wanted of a kind, else by one list for the kind.
LIVE: Final = {
    "Chart.yaml": "apiVersion: v2\nname: live\nversion: 0.0.0\n",
    "templates/live.yaml": """\
{{- $found := list }}
{{- range $wanted := .Values.wanted }}
  {{- $there := list }}
  {{- if or (not $wanted.names) (gt (len $wanted.names) 3) }}
    {{- range (lookup $wanted.apiVersion $wanted.kind $wanted.namespace "").items }}
      {{- if or (not $wanted.names) (has .metadata.name $wanted.names) }}{{ $there = append $there . }}{{ end }}
    {{- end }}
  {{- else }}
    {{- range $wanted.names }}
      {{- with lookup $wanted.apiVersion $wanted.kind $wanted.namespace . }}{{ $there = append $there . }}{{ end }}
    {{- end }}
  {{- end }}
  {{- range $there }}{{ $_ := unset .metadata "managedFields" }}{{ end }}
  {{- $found = append $found $there }}
{{- end -}}
apiVersion: v1
kind: ConfigMap
metadata: {name: live}
data: {live: {{ toJson $found | quote }}}
""",
}


@contextlib.contextmanager
def chart(place: Path, name: str, texts: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A folder in `place` for a chart of toto's own, with its files, while the block lasts."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=place) as made:
        write(Path(made), texts or {})
        yield Path(made)


def write(folder: Path, texts: Mapping[str, str]) -> None:
    for file, text in texts.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)


def escaped(text: str) -> str:
    """A template that renders to exactly `text`."""
    return text.replace("{{", '{{ "{{" }}')


def template(resources: Iterable[Resource]) -> str:
    """A template that renders to exactly these resources. (JSON is YAML that nobody reads in two ways.)"""
    return escaped(manifest.joined(json.dumps(each, default=str) for each in resources))


def apart(rendered: str) -> tuple[str, str]:
    """What `helm template --include-crds` printed: the templates' part, and that of `crds/`."""
    crds = _CRDS.match(rendered)
    return (rendered[crds.end() :], crds[0]) if crds else (rendered, "")


def crds(text: str) -> dict[Key, Resource]:
    """The CRDs in the text of a chart's `crds/`."""
    return {key: each for key, each in manifest.parse(text).items() if key.kind == _CRD}


def crds_of(folder: Path) -> dict[Key, Resource]:
    """The CRDs in the `crds/` of a chart of toto's own."""
    file = folder / "crds/all.yaml"
    return crds(file.read_text()) if file.exists() else {}


def kinds_of(found: Iterable[Resource]) -> set[str]:
    """What CRDs define, as helm names it: `example.org/v1/Thing`."""
    kinds = set()
    for each in found:
        spec: Any = each.get("spec") or {}
        versions = [one.get("name") for one in spec.get("versions") or () if one.get("served", True)]
        kinds |= {
            f"{spec.get('group')}/{version}/{(spec.get('names') or {}).get('kind')}"
            for version in versions or [spec.get("version")]
        }
    return kinds


def kind_of(resource: Resource) -> str:
    """Its kind, as helm names it: `apps/v1/Deployment`."""
    return f"{resource.get('apiVersion')}/{resource['kind']}"


def questions(wanted: Iterable[Resource], namespace: str) -> list[dict[str, Any]]:
    """What the chart LIVE is asked, one question for each kind and namespace. One without a name stands for all."""
    asked: dict[tuple[str, str, str], list[str] | None] = {}
    for each in wanted:
        about = each["metadata"]
        place = str(each["apiVersion"]), str(each["kind"]), str(about.get("namespace") or namespace)
        if not about.get("name"):
            asked[place] = None
        elif (names := asked.setdefault(place, [])) is not None and about["name"] not in names:
            names.append(about["name"])
    return [
        {"apiVersion": version, "kind": kind, "namespace": where, "names": names}
        for (version, kind, where), names in asked.items()
    ]


def answers(said: str, asked: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[Resource]]:
    """What is live, by version, kind and namespace."""
    (answer,) = manifest.parse(said).values()
    live: list[list[Resource]] = json.loads(answer["data"]["live"])
    return {
        (each["apiVersion"], each["kind"], each["namespace"]): found for each, found in zip(asked, live, strict=True)
    }
