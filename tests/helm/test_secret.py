"""Which texts of a release are secret, and which words are not."""

import io
import tarfile
from pathlib import Path

import pytest

from tests.helm.test_release import CHART, one
from toto.helm.diff import masks_of
from toto.helm.manifest import parse
from toto.helm.secret import Masks, of_values


def masks(tree: Path, files: dict[str, str], text: str = "") -> set[str]:
    """What is masked by the values of a release."""
    release = one(tree, text, {"helm/web/Chart.yaml": CHART, **files})
    return set(Masks.worth(*of_values(release, tree)).texts)


def test_values_of_keys_that_sound_like_secrets_are_known(tmp_path: Path) -> None:
    assert masks(
        tmp_path,
        {
            "helm/web/values.yaml": "adminPassword: swordfish\nname: harmless\n",
            "helm/web/more.yaml": "db: {credentials: [user-one, {x: pass-two}], port: 5432}\ntoken: abc\n",
            "helm/web/broken.yaml": "password: [unclosed\n",
        },
        "values: [more.yaml, broken.yaml]\n",
    ) >= {"swordfish", "user-one", "pass-two"}


@pytest.mark.parametrize(
    "values",
    [
        "auth: {existingSecret: prometheus-auth, secretName: prometheus, passwordKey: admin-password}",
        "secret: {create: create, name: prometheus, enabled: true, annotations: {a: something}, type: Opaque}",
        "secrets: {mode: create}",
        "password: 1234567",
        "tokens: {ttl: 86400s, audience: https://example.org, policy: rotate-weekly}",
        "prometheus: {a: b}\npassword: prometheus",  # the name of something else
        "credentials: {username: operator, host: db.example.org}",
        "password: webbie\nwebbie: 1",
    ],
)
def test_a_word_that_is_no_secret_is_no_mask(tmp_path: Path, values: str) -> None:
    assert masks(tmp_path, {"helm/web/values.yaml": values + "\n"}) == set()


@pytest.mark.parametrize(
    "values",
    [
        "adminPassword: prom-0perator",
        "auth: {secretKey: prom-0perator}",
        "config: {DB_PASSWORD: prom-0perator}",
        "extraSecrets: {db: {dsn: prom-0perator}}",
        "api: {apiKey: prom-0perator}",
        "users: [{name: a, private_key: prom-0perator}]",
    ],
)
def test_what_is_a_secret_is_masked_wherever_it_is_in_the_values(tmp_path: Path, values: str) -> None:
    assert "prom-0perator" in masks(tmp_path, {"helm/web/values.yaml": values + "\n"})


def test_the_parts_of_a_chart_have_secrets_too(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as made:
        text = b"password: from-the-archive-1\n"
        about = tarfile.TarInfo("redis/values.yaml")
        about.size = len(text)
        made.addfile(about, io.BytesIO(text))
    (tmp_path / "helm/web/charts").mkdir(parents=True)
    (tmp_path / "helm/web/charts/redis.tgz").write_bytes(packed.getvalue())
    (tmp_path / "helm/web/charts/bad.tgz").write_bytes(packed.getvalue()[:40])
    found = masks(tmp_path, {"helm/web/charts/db/values.yaml": "password: from-the-folder-1\n"})
    assert found >= {"from-the-archive-1", "from-the-folder-1"}


def test_values_that_refer_to_each_other_without_end_are_read_quickly(tmp_path: Path) -> None:
    bomb = "a0: &a0 {password: swordfish}\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
    )
    assert "swordfish" in masks(tmp_path, {"helm/web/values.yaml": bomb})


def test_a_secret_that_is_the_name_of_an_image_does_not_hide_it() -> None:
    text = (
        "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {user: postgres, password: swordfish}\n---\n"
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: db, image: 'postgres:15'}]}\n"
    )
    hidden = masks_of(list(parse(text).values()))
    assert hidden("postgres:15 swordfish") == "postgres:15 ******"
