"""helm/NAME/release.yaml: what is accepted, how mistakes are reported, and what changes a release's identity."""

import pickle
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.repos import InfraRepo
from toto.base.errors import InputError
from toto.helm.release import Release, ReleaseFile, ReleaseFileError, discover, identity

CHART = "apiVersion: v2\nname: web\nversion: 0.1.0\n"


def write(tree: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tree


def one(tree: Path, text: str, files: dict[str, str] | None = None) -> Release:
    (release,) = discover(write(tree, {"helm/web/release.yaml": text} | (files or {})))
    return release


def problems(tree: Path, text: str, files: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ReleaseFileError) as caught:
        one(tree, text, files)
    return caught.value.problems


def test_tree_without_helm_has_no_release(tmp_path: Path) -> None:
    assert discover(tmp_path) == []
    assert discover(write(tmp_path, {"helm/README.md": "", "helm/shared/Chart.yaml": CHART})) == []


def test_empty_release_file_beside_a_chart_is_a_release(tmp_path: Path) -> None:
    release = one(tmp_path, "", {"helm/web/Chart.yaml": CHART, "helm/web/values.yaml": "a: 1\n"})
    assert release == Release(name="web", file="helm/web/release.yaml", chart="helm/web")
    assert (release.namespace, release.wait, release.timeout, release.values) == ("default", True, 300, ())
    assert release.label == "helm/web" and not release.remote
    assert pickle.loads(pickle.dumps(release)) == release
    assert Release.model_validate_json(release.model_dump_json()) == release


def test_chart_in_a_folder_of_its_own_gets_the_values_beside_it(tmp_path: Path) -> None:
    release = one(tmp_path, "", {"helm/web/chart/Chart.yaml": CHART, "helm/web/values.yaml": "a: 1\n"})
    assert (release.chart, release.values) == ("helm/web/chart", ("helm/web/values.yaml",))


@pytest.mark.parametrize("chart", ["../../charts/web", "/charts/web", "link"])
def test_chart_elsewhere_in_the_repo_is_found_from_the_folder_or_the_root(tmp_path: Path, chart: str) -> None:
    write(tmp_path, {"charts/web/Chart.yaml": CHART, "helm/web/prod.yaml": "a: 1\n", "common.yaml": "a: 2\n"})
    (tmp_path / "helm/web/link").symlink_to("../../charts/web")
    release = one(tmp_path, f"chart: {chart}\nvalues: [/common.yaml, prod.yaml]\n")
    assert (release.chart, release.values) == ("charts/web", ("common.yaml", "helm/web/prod.yaml"))


def test_every_field_of_a_remote_release_is_read(tmp_path: Path) -> None:
    release = one(
        tmp_path,
        """\
        chart: grafana
        repo: https://charts.example.org
        version: 1.2.3-rc.1+x
        namespace: monitoring
        create_namespace: false
        values: [values.yaml]
        timeout: 60
        wait: false
        after:
        tags: [edge]
        test: false
        """,
        {"helm/web/values.yaml": ""},
    )
    assert release.remote and release.chart == "grafana" and release.version == "1.2.3-rc.1+x"
    assert (release.namespace, release.create_namespace, release.timeout, release.wait, release.test) == (
        "monitoring",
        False,
        60,
        False,
        False,
    )
    assert (release.after, release.tags) == ((), ("edge",))


def test_chart_of_a_registry_is_named_either_way(tmp_path: Path) -> None:
    whole = one(tmp_path, "chart: oci://registry.example.org/charts/web\nversion: 1.0.0\n")
    parts = one(tmp_path, "chart: web\nrepo: oci://registry.example.org/charts/\nversion: 1.0.0\n")
    assert whole.chart == parts.chart == "oci://registry.example.org/charts/web"
    assert whole.remote and parts.remote


def test_releases_come_after_those_they_name(tmp_path: Path) -> None:
    for name, after in {"a": "[c]", "b": "[]", "c": "[d]", "d": "[]"}.items():
        write(tmp_path, {f"helm/{name}/release.yaml": f"after: {after}\n", f"helm/{name}/Chart.yaml": CHART})
    assert [release.name for release in discover(tmp_path)] == ["b", "d", "c", "a"]


def test_circle_and_unknown_name_are_reported_with_their_lines(tmp_path: Path) -> None:
    for name, after in {"a": "b", "b": "a", "c": "nobody", "d": "d"}.items():
        write(
            tmp_path,
            {f"helm/{name}/release.yaml": f"wait: false\nafter: [{after}]\n", f"helm/{name}/Chart.yaml": CHART},
        )
    with pytest.raises(ReleaseFileError) as caught:
        discover(tmp_path)
    circle, unknown, own = sorted(caught.value.problems)
    assert "yaml:2: after: this goes round in a circle: " in circle
    assert own == "helm/d/release.yaml:2: after: this goes round in a circle: d after d"
    assert unknown == "helm/c/release.yaml:2: after: there is no release 'nobody'"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a", "1: should be a mapping of fields, not a list"),
        ("chrt: x", "1: chrt: is not a known field; did you mean 'chart'?"),
        ("name: x", "1: name: is not a known field; did you mean 'namespace'?"),
        ("wait: 'no'", "1: wait: should be true or false, not 'no'"),
        ("wait: true\ntimeout: -1", "2: timeout: should be more than 0, not -1"),
        ("timeout: 5m", "1: timeout: should be a number, not '5m'"),
        ("namespace: A_b", "1: namespace: should be 1 to 63 lower case letters, digits and '-', not 'A_b'"),
        ("namespace: 5", "1: namespace: should be text, not 5: put it in quotes"),
        ("values: values.yaml", "1: values: should be a list, not 'values.yaml'"),
        ("values: [a.yaml, a.yaml]", "1: values: should name each once, not 'a.yaml' twice"),
        ("values:\n- values.yaml\n- prod.yaml", "3: values: there is no 'helm/web/prod.yaml'"),
        ("values: [../../../x]", "1: values: '../../../x' leads out of the repo"),
        ("values: [--set=a=b]", "1: values: should be one line of text that does not begin with '-', not '--set=a=b'"),
        ("\nchart: ../../..", "2: chart: '../../..' leads out of the repo"),
        ("chart: /", "1: chart: '/' leads out of the repo"),
        ("chart: out", "1: chart: 'out' leads out of the repo"),
        ("chart: linked", "1: chart: a link in it leads out of the repo, to /etc/hostname"),
        ("chart: round", "1: chart: there is no 'helm/web/round'"),
        (f"chart: {'x' * 5000}", f"1: chart: there is no 'helm/web/{'x' * 191}…'"),
        ("chart: /charts/nope", "1: chart: there is no 'charts/nope'"),
        ("chart: /docs", "1: chart: there is no Chart.yaml in docs"),
        ("chart: values.yaml", "1: chart: there is no Chart.yaml in helm/web/values.yaml"),
        ("repo: https://x.org\nversion: 1.0.0", "1: repo: a repo needs a chart: its name there"),
        (
            "chart: x\nrepo: https://x.org",
            "1: version: is missing: a remote chart needs one exact version, to stay the same",
        ),
        ("chart: oci://x.org/x", "1: version: is missing: a remote chart needs one exact version, to stay the same"),
        (
            "chart: x\nrepo: https://x.org\nversion: ^1.0",
            "3: version: should be one exact version like '1.2.3', not '^1.0'",
        ),
        ("chart: x\nrepo: https://x.org\nversion: 1.2", "3: version: should be text, not 1.2: put it in quotes"),
        (
            "chart: x\nrepo: http://x.org\nversion: 1.0.0",
            "2: repo: should be like 'https://charts.example.org' or 'oci://registry.example.org/charts', without a "
            "user's name, not 'http://x.org'",
        ),
        (
            "chart: x\nrepo: https://me:pw@x.org\nversion: 1.0.0",
            "2: repo: should be like 'https://charts.example.org' or 'oci://registry.example.org/charts', without a "
            "user's name, not 'https://me:pw@x.org'",
        ),
        ("version: 1.0.0", "1: version: is only for a remote chart; a chart in the repo has its version in Chart.yaml"),
        ("chart: [", "1: is not YAML: while parsing a flow node: expected the node content, but found '<stream end>'"),
        ("wait: true\nwait: true", "2: wait: is given twice, first on line 1"),
    ],
)
def test_what_is_wrong_is_reported_with_file_line_and_field(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "helm/web").mkdir(parents=True)
    (tmp_path / "helm/web/out").symlink_to("/etc")
    (tmp_path / "helm/web/round").symlink_to("round")
    write(tmp_path, {"helm/web/linked/Chart.yaml": CHART, "docs/README.md": ""})
    (tmp_path / "helm/web/linked/file").symlink_to("/etc/hostname")
    files = {"helm/web/values.yaml": "", "helm/web/chart/Chart.yaml": CHART}
    assert problems(tmp_path, text, files) == (f"helm/web/release.yaml:{problem}",)


def test_release_without_any_chart_is_reported(tmp_path: Path) -> None:
    assert problems(tmp_path, "wait: true\n") == ("helm/web/release.yaml:1: chart: there is no 'helm/web/chart'",)


@pytest.mark.parametrize("name", ["Web", "a_b", "ä", "-a", "a" * 54, "a..b", "a b"])
def test_folder_that_cannot_name_a_release_is_reported(tmp_path: Path, name: str) -> None:
    write(tmp_path, {f"helm/{name}/release.yaml": "", f"helm/{name}/Chart.yaml": CHART})
    with pytest.raises(ReleaseFileError, match=r"release.yaml:1: a release's name should be 1 to 53 lower case"):
        discover(tmp_path)


def test_problems_of_all_releases_are_reported_at_once(tmp_path: Path) -> None:
    write(tmp_path, {"helm/a/release.yaml": "wait: 1\ntest: 2\n", "helm/b/release.yaml": "\0"})
    with pytest.raises(ReleaseFileError) as caught:
        discover(tmp_path)
    assert caught.value.problems == (
        "helm/a/release.yaml:1: wait: should be true or false, not 1",
        "helm/a/release.yaml:2: test: should be true or false, not 2",
        "helm/b/release.yaml:1: holds the character U+0000, which YAML does not allow",
    )


async def test_identity_changes_with_all_that_makes_the_release_and_nothing_else(tmp_path: Path) -> None:
    repo = InfraRepo(tmp_path / "repo")
    (repo.work / "helm/web").mkdir(parents=True)
    (repo.work / "helm/web/chart").symlink_to("../../charts/web")
    (repo.work / "charts/web/templates").mkdir(parents=True)
    (repo.work / "charts/web/templates/shared.yaml").symlink_to("../../../shared/x.yaml")

    async def of(files: dict[str, str | None]) -> str:
        commit = repo.commit(files)
        (release,) = discover(repo.work)
        return await identity(repo.bare, commit, repo.work, release)

    seen = [
        await of(
            {
                "helm/web/release.yaml": "values: [values.yaml, /all.yaml]\n",
                "all.yaml": "a: 1\n",
                "charts/web/Chart.yaml": CHART,
                "helm/web/values.yaml": "a: 1\n",
                "shared/x.yaml": "x: 1\n",
            }
        )
    ]
    for name in ("README.md", "helm/web/README.md", "helm/other/x", "shared/y.yaml", "charts/x"):
        assert await of({name: "x"}) == seen[0]
    for name in (
        "charts/web/Chart.yaml",
        "charts/web/templates/new.yaml",
        "helm/web/values.yaml",
        "all.yaml",
        "helm/web/release.yaml",
        "shared/x.yaml",
    ):
        path = repo.work / name
        now = await of({name: (path.read_text() if path.exists() else "") + "# changed\n"})
        assert now not in seen, name
        seen.append(now)


async def test_identity_of_a_tree_that_is_not_the_commits_is_refused(tmp_path: Path) -> None:
    repo = InfraRepo(tmp_path / "repo")
    commit = repo.commit({"helm/web/release.yaml": "", "README.md": ""})
    write(repo.work, {"helm/web/chart/Chart.yaml": CHART})
    (release,) = discover(repo.work)
    with pytest.raises(InputError, match="does not have all of helm/web/chart"):
        await identity(repo.bare, commit, repo.work, release)


def test_the_docs_name_every_field_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "helm.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))
    assert documented.keys() == ReleaseFile.model_fields.keys()
    for name, field in ReleaseFile.model_fields.items():
        if field.default not in (None, ()):
            assert documented[name] == f"`{str(field.default).lower()}`", name


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["chart", ".", "/", "..", "oci://x.org/y", "https://x.org", "1.2.3", "web", "values.yaml", "../web/chart"]
    )
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*ReleaseFile.model_fields, "x"]), scalars | st.lists(scalars, max_size=3)))
def test_whatever_the_file_says_it_is_a_release_or_an_error(tmp_path: Path, fields: dict[str, object]) -> None:
    files = {"helm/web/values.yaml": "", "helm/web/chart/Chart.yaml": CHART}
    try:
        release = one(tmp_path, yaml.safe_dump(fields), files)
    except ReleaseFileError as error:
        assert all(re.match(r"helm/web/release.yaml:\d+: \S", each) for each in error.problems)
    else:
        assert release.remote or (tmp_path / release.chart / "Chart.yaml").exists()
        assert all((tmp_path / each).is_relative_to(tmp_path) for each in release.values)
