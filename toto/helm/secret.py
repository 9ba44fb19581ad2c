"""Which texts of a release are secret, and how they are masked.

A mask is a value: what a Secret holds, and what the chart's values call a password, a token and so on. It is masked
wherever it turns up. A word that the manifests or the values use as a name (`prometheus`, `create`) is no mask.
"""

import base64
import binascii
import contextlib
import gzip
import io
import itertools
import json
import re
import tarfile
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from toto.base import process
from toto.base.errors import InputError
from toto.helm.manifest import Resource, load
from toto.helm.release import Release

SHORTEST: Final = 6  # characters: a shorter text turns up everywhere by chance
LARGEST: Final = 4_000_000  # bytes of values that are read of one file
MOST: Final = 8_000_000  # bytes of values that are read of one release
MOST_FILES: Final = 2_000  # of an archive that are looked at
MOST_UNPACKED: Final = 100_000_000  # bytes
MASK: Final = "******"

_SENSITIVE: Final = re.compile(
    r"passw|passphrase|pwd|secret|token|credential|private|dsn|(api|access|encryption|signing|master|shared)[-_]?key",
    re.IGNORECASE,
)
# What stands below such a key, or is one, and only says where the secret is, whose it is, or how it is treated.
_AROUND: Final = re.compile(
    r"^existing|(password|token|user|username)[-_]?keys?$|"
    r"(^|[-_a-z])(names?|namespaces?|refs?|paths?|files?|mounts?|enabled?|create|type|class|labels|annotations|policy|"
    r"ttl|expir\w*|audiences?|issuer|method|urls?|hosts?|ports?|version|image|repository|user|username|login|email|"
    r"database|kind|provider|algorithm|template|scopes?)$",
    re.IGNORECASE,
)
_WORD: Final = re.compile(r"[A-Za-z]+(?:[-_./][A-Za-z]+)*")
_ONLY_A_KEY: Final = re.compile(r"[A-Za-z_.-]+:\s*[|>]?[-+]?|\W+")
_VOCABULARY: Final = re.compile(
    r"accept|admission|always|annotations|backend|boolean|chart|cluster|config|configmap|container|creat(e|ed|ing)|"
    r"custom|default|delete|deleted|deployment|disabled?|disallowed|enabled?|error|existing|failed|false|forbidden|"
    r"generate|helm|ingress|install|integer|invalid|issuer|kubernetes|labels|manifest|metadata|missing|monitoring|"
    r"namespace|never|number|object|optional|password|patch|private|public|random|release|render|required|resource|"
    r"secret|service|status|string|template|token|unknown|update|upgrade|username|validat(e|ion)|values|version|volume|"
    r"webhook",
    re.IGNORECASE,
)


def of_manifest(resources: Iterable[Resource]) -> set[str]:
    """All texts in the Secrets among `resources`."""
    found: set[str] = set()
    for each in resources:
        for value in data(each).values() if each["kind"] == "Secret" else ():
            try:
                found.add(base64.b64decode(value, validate=True).decode())
            except (binascii.Error, ValueError):
                found.add(str(value))
    return found


def of_values(release: Release, tree: Path, archive: Path | None = None) -> tuple[set[str], set[str]]:
    """The texts that the values of a release call secret, and words that are none: their keys, the release's names.

    Its files of values, its chart's own and those of its parts are read. `archive` is the chart, if it is a remote one.
    """
    texts, names = set[str](), {release.name, release.namespace, Path(release.chart).name}
    for each in _documents(release, tree, archive):
        texts.update(_sensitive(each, False, set()))
        names.update(_keys(each, set()))
    return texts, names | {word for each in names for word in re.split(r"[^A-Za-z]+", each)}


@dataclass(frozen=True)
class Masks:
    """The texts to mask, the longest first, because one may be part of a longer one."""

    texts: Sequence[str] = field(default=(), repr=False)

    @classmethod
    def worth(cls, texts: Iterable[str], public: Iterable[str] = ()) -> "Masks":
        """Those of `texts` that are long enough, and no words that are `public`; in every form, and line by line."""
        words = {each.lower() for each in public}
        found: set[str] = set()
        for text in {*texts}:
            if _is_secret(text, words):
                found |= {text, json.dumps(text)[1:-1], base64.b64encode(text.encode()).decode()}
            found |= {line.strip() for line in text.splitlines() if _is_secret(line.strip(), words)}
        return cls(sorted(found, key=lambda text: (-len(text), text)))

    def __call__(self, text: str) -> str:
        return process.mask(text, self.texts)

    def pair(self, old: str, new: str) -> tuple[str, str]:
        """Two texts, the one before and the one after, masked. Where one has a secret, so has the other.

        (Of what was deployed before, the values are not known any more.)
        """
        left, right = self(old), self(new)
        if MASK in right and left == old:
            return like(left, right), right
        if MASK in left and right == new:
            return left, like(right, left)
        return left, right


def like(text: str, masked: str) -> str:
    """A text with that in it masked which stands where something is masked in a text like it."""
    parts = masked.split(MASK)
    if re.fullmatch(".+".join(map(re.escape, parts)), text, re.DOTALL):
        return masked
    return f"{parts[0]}{MASK}" if text.startswith(parts[0]) else MASK


def public(resources: Iterable[Resource]) -> set[str]:
    """The words that manifests use as names: of resources, kinds, fields, labels, images."""
    found: set[str] = set()
    seen: set[int] = set()

    def add(value: object) -> None:
        if isinstance(value, str) and len(value) < 300:
            found.update((value, *re.split(r"[^A-Za-z]+", value)))

    def look(value: object, named: bool) -> None:
        if isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            for key, each in value.items():
                add(key)
                if key not in ("data", "stringData"):
                    look(each, key in ("name", "namespace", "kind", "image", "labels", "matchLabels", "app") or named)
        elif isinstance(value, list) and id(value) not in seen:
            seen.add(id(value))
            for each in value:
                look(each, False)
        elif named:
            add(value)

    for each in resources:
        look(each, False)
    return found


class Hidden(str):
    """A value of a Secret: it compares like any text and is shown as `******`."""

    __slots__ = ()


def data(secret: Resource) -> dict[str, str]:
    """Everything in a Secret, as base64 (`stringData` is a second way to write `data`)."""
    coded, texts = (each if isinstance(each := secret.get(part), dict) else {} for part in ("data", "stringData"))
    return {key: Hidden("".join(str(value).split())) for key, value in coded.items()} | {
        key: Hidden(base64.b64encode(str(value).encode()).decode()) for key, value in texts.items()
    }


def _keys(value: object, seen: set[int]) -> Iterator[str]:
    if isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            yield from map(str, value)
        for each in value.values() if isinstance(value, dict) else value:
            yield from _keys(each, seen)


def _is_secret(text: str, public: Container[str]) -> bool:
    if len(text) < SHORTEST or _ONLY_A_KEY.fullmatch(text):
        return False
    return not (_WORD.fullmatch(text) and (_VOCABULARY.fullmatch(text) or text.lower() in public))


def _sensitive(value: object, under: bool, seen: set[tuple[int, bool]]) -> Iterator[str]:
    if (id(value), under) in seen:  # an alias: a few aliases can stand for a billion values
        return
    match value:
        case str() if under:
            yield value
        case dict():
            seen.add((id(value), under))
            for key, each in value.items():
                around = bool(_AROUND.search(str(key)))
                yield from _sensitive(each, not around and (under or bool(_SENSITIVE.search(str(key)))), seen)
        case list():
            seen.add((id(value), under))
            for each in value:
                yield from _sensitive(each, under, seen)


def _documents(release: Release, tree: Path, archive: Path | None) -> Iterator[object]:
    """The documents of all files of values. What cannot be read is left out: helm says what is wrong with it."""
    left = MOST
    for text in _texts(release, tree, archive):
        left -= len(text)
        if left < 0:
            return
        with contextlib.suppress(InputError):
            yield from load(text)


def _texts(release: Release, tree: Path, archive: Path | None) -> Iterator[str]:
    for each in release.values:
        yield from _read(tree / each)
    chart = archive if archive is not None else None if release.remote else tree / release.chart
    if chart is None:
        return
    if chart.is_dir():
        yield from _read(chart / "values.yaml")
        for part in sorted(chart.glob("charts/**/values.yaml"))[:MOST_FILES]:
            yield from _read(part)
    for packed in [chart] if chart.is_file() else sorted(chart.glob("charts/*.tgz")):
        yield from _packed(packed)


def _read(file: Path) -> Iterator[str]:
    with contextlib.suppress(OSError), file.open("rb") as opened:
        yield opened.read(LARGEST).decode(errors="replace")


def _packed(archive: Path) -> Iterator[str]:
    """The files of values in a chart's archive, as far as it unpacks to no more than `MOST_UNPACKED`."""
    with (
        contextlib.suppress(OSError, EOFError, zlib.error, tarfile.TarError),
        gzip.open(archive) as unpacked,
        tarfile.open(fileobj=_Bounded(unpacked), mode="r|") as opened,
    ):
        for each in itertools.islice(opened, MOST_FILES):
            if each.isreg() and each.name.endswith("/values.yaml") and (file := opened.extractfile(each)):
                yield file.read(LARGEST).decode(errors="replace")


class _Bounded(io.RawIOBase):
    """A stream that ends after `MOST_UNPACKED` bytes."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self.stream, self.left = stream, MOST_UNPACKED

    def read(self, size: int = -1) -> bytes:
        said = self.stream.read(min(size, self.left) if size >= 0 else self.left)
        self.left -= len(said)
        return said
