"""Which checks a commit has, which are for which machine, and when they are different ones."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from toto.base.errors import InputError
from toto.compliance.checks import digest, find, gated, includes
from toto.infra_repo.settings import Compliance, Settings

FILES = {
    "inspec/base/inspec.yml": "name: base\n",
    "inspec/base/controls/a.rb": "",
    "inspec/waivers.txt": "",
    "inspec/.hidden/inspec.yml": "",
    "inspec/docs/README.md": "",
    "compliance/ssh.py": "",
    "compliance/conftest.py": "",
    "compliance/_shared.py": "",
    "compliance/README.md": "",
    "compliance/folder/x.py": "",
}


def tree(tmp_path: Path, files: Mapping[str, str] = FILES) -> Path:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def settings(**compliance: object) -> Compliance:
    return Compliance.model_validate(compliance)


def test_a_repo_without_checks_has_none(tmp_path: Path) -> None:
    assert find(tmp_path, settings(), ()) == ()


def test_profiles_and_modules_are_found(tmp_path: Path) -> None:
    found = find(tree(tmp_path), settings(), ())
    assert [(each.kind, each.name, str(each)) for each in found] == [
        ("inspec", "base", "inspec/base"),
        ("testinfra", "ssh", "compliance/ssh.py"),
    ]


def test_tags_choose_machines_and_checks(tmp_path: Path) -> None:
    its = settings(tags=("production",), checks={"ssh": {"tags": ("web",), "controls": ("test_a",)}})
    assert [includes(its, tags) for tags in ((), ("web",), ("web", "production"))] == [False, False, True]
    assert includes(settings(), ())
    assert [str(each) for each in find(tree(tmp_path), its, ("production",))] == ["inspec/base"]
    (_, ssh) = find(tmp_path, its, ("production", "web"))
    assert ssh.controls == ("test_a",)
    gate = Settings.model_validate({"roll_out": {"compliance": "gate"}, "compliance": its.model_dump()})
    assert (gated(gate, ("production",)), gated(gate, ()), gated(Settings(), ())) == (True, False, False)


@pytest.mark.parametrize(
    ("files", "named", "message"),
    [
        ({"inspec/base/controls/a.rb": ""}, {}, "inspec/base: has controls and no inspec.yml\nnext: "),
        (FILES, {"sshd": {}}, r"toto.toml: compliance.checks.sshd: there is no such check\nnext: there are inspec/"),
        ({}, {"sshd": {}}, r"there is no such check\nnext: there are none: they are inspec/PROFILE/ and"),
        ({**FILES, "compliance/base.py": ""}, {}, "compliance/base.py: has the name of inspec/base"),
        ({"compliance/a b.py": ""}, {}, "compliance/a b.py: a module's name should be"),
        ({"inspec/a b/inspec.yml": ""}, {}, "inspec/a b: a profile's name should be"),
    ],
)
def test_what_would_never_run_is_an_error(
    files: Mapping[str, str], named: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        find(tree(tmp_path, files), settings(checks=named), ())


@pytest.mark.parametrize("link", ["compliance", "inspec", "compliance/out.py", "inspec/out"])
def test_a_link_out_of_the_repository_is_an_error(link: str, tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", {"x.py": "", "inspec.yml": ""})
    place = tree(tmp_path / "tree", {"toto.toml": ""}) / link
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{link}: this link leads out of the repository"):
        find(tmp_path / "tree", settings(), ())


def test_the_digest_is_of_all_that_the_checks_may_read(tmp_path: Path) -> None:
    def now(**compliance: object) -> str:
        return digest(tmp_path, find(tmp_path, settings(**compliance), ()))

    tree(tmp_path)
    seen = [now()]
    assert now() == seen[0]
    for name in ("compliance/_shared.py", "compliance/ssh.py", "inspec/base/controls/a.rb", "inspec/base/waivers.yaml"):
        (tmp_path / name).write_text("changed\n")
        seen.append(now())
    (tmp_path / "compliance/ssh.py").chmod(0o755)
    seen.append(now())
    (tmp_path / "compliance/link").symlink_to("ssh.py")
    seen += [now(), now(checks={"ssh": {"controls": ("test_a",)}})]
    assert len(set(seen)) == len(seen)
    (tmp_path / "README.md").write_text("words\n")
    assert now() == seen[-2]


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    tree(tmp_path)
    with (tmp_path / "compliance/huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="compliance/huge: is no file, or one of more than 50 MB"):
        digest(tmp_path, find(tmp_path, settings(), ()))
