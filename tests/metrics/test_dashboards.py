"""Whether the dashboards are such as Grafana knows: by the types of `@grafana/schema`, and TypeScript's compiler.

Both are of npm's registry, by the versions and hashes of schema/package-lock.json; they are kept in toto's cache.
"""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from toto.metrics.dashboards import dashboards

SCHEMA: Final = Path(__file__).parent / "schema"
STRICT: Final = ("--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler")


@pytest.fixture(scope="module")
def compiler() -> Path:
    """The folder with compiler and types, installed when it is missing."""
    if shutil.which("npm") is None:
        pytest.skip("THE DASHBOARDS ARE NOT CHECKED AGAINST GRAFANA'S SCHEMA: there is no npm")
    lock = (SCHEMA / "package-lock.json").read_bytes()
    folder = Path(os.environ["TOTO_CACHE"]) / f"grafana-schema-{hashlib.sha256(lock).hexdigest()[:12]}"
    if not (folder / "complete").exists():
        shutil.copytree(SCHEMA, folder, dirs_exist_ok=True)
        words = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            pytest.skip(f"THE DASHBOARDS ARE NOT CHECKED AGAINST GRAFANA'S SCHEMA: npm: {done.stderr[-500:]}")
        (folder / "complete").touch()
    return folder


def complaints(compiler: Path, folder: Path, made: dict[str, dict[str, Any]]) -> list[str]:
    """What the compiler says of dashboards."""
    lines = [f"export const {name}: Dashboard = {json.dumps(each)};\n" for name, each in made.items()]
    (folder / "check.ts").write_text('import type { Dashboard } from "@grafana/schema";\n' + "".join(lines))
    (folder / "node_modules").symlink_to(compiler / "node_modules")
    words = [str(compiler / "node_modules/.bin/tsc"), *STRICT, "check.ts"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False).stdout.splitlines()


def test_the_dashboards_are_grafana_s(compiler: Path, tmp_path: Path) -> None:
    assert complaints(compiler, tmp_path, dashboards()) == []


def test_what_is_no_dashboard_is_seen(compiler: Path, tmp_path: Path) -> None:
    [line] = complaints(compiler, tmp_path, {"wrong": {**dashboards()["fleet"], "title": 3}})
    assert "'number' is not assignable to type 'string'" in line


def test_no_two_panels_are_in_one_place() -> None:
    for name, dashboard in dashboards().items():
        taken = [
            (x, y)
            for panel in dashboard["panels"]
            for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
        ]
        assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24, name
