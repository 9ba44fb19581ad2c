"""Which modules a .tf file calls, whatever else is in it."""

import pytest

from toto.terraform.hcl import Module, json_modules, json_without, modules, without


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('module "a" { source = "../a" }', [("a", "../a", 1)]),
        (
            '\nmodule "a" {\n  count = 2\n  source   =\n    "../a b/ü"\n}\nmodule b { source = "./b" }',
            [("a", "../a b/ü", 5), ("b", "./b", 7)],
        ),
        (
            '# module "a" { source = "../a" }\n// module "a" { source = "../a" }\n'
            '/* module "a" {\n source = "../a" } */',
            [],
        ),
        (
            'module "a" {\n providers = { source = "../no" }\n x = [{ source = "../no" }]\n source = "../a"\n}',
            [("a", "../a", 4)],
        ),
        (
            'module "a" {\n x = "${ { source = "}" }["source"] } %{ if true }}%{ endif } \\" $${"\n source = "../a"\n}',
            [("a", "../a", 3)],
        ),
        ('module "a" {\n x = <<-EOT\n  source = "../no"\n  }\n  EOT\n source = "../a"\n}', [("a", "../a", 6)]),
        ('x = <<A\nmodule "a" { source = "../a" }', []),
        (
            'resource "module" "x" { source = "../no" }\nlocals { source = "../no" }\noutput "y" { value = module.a }',
            [],
        ),
        ('module "a" { source = "../a"', [("a", "../a", 1)]),
        ('module "a" {', []),
        ('"', []),
        ("}}}", []),
        ("", []),
        ("\0\ufeffmodule", []),
        ('module "a" { source = var.x }\nmodule "b" { source = "../b" }', [("b", "../b", 2)]),
    ],
)
def test_modules_are_found(text: str, found: list[tuple[str, str, int]]) -> None:
    assert list(modules(text)) == [Module(*each) for each in found]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"module": {"a": {"source": "../a"},\n "b": [{"source": "./b"}]}}', [("a", "../a", 1), ("b", "./b", 2)]),
        ('{"module": [{"a": {"source": "../a"}}]}', [("a", "../a", 1)]),
        ('{"module": {"a": {"source": "../x"},\n "b": {"source": "../x"}}}', [("a", "../x", 1), ("b", "../x", 2)]),
        ('{"module": {"a": {}}}', []),
        ('{"module": 3}', []),
        ('{"module": {"a": "x"}}', []),
        ("[1]", []),
        ("{", []),
        ("", []),
        ("[" * 100_000, []),
    ],
)
def test_modules_are_found_in_json(text: str, found: list[tuple[str, str, int]]) -> None:
    assert list(json_modules(text)) == [Module(*each) for each in found]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["<<A\n", "<<A ", "/*", '"${', "{", "a", '"\\', '${"', '"', "#"])
def test_a_huge_file_is_no_trouble(text: str) -> None:
    assert list(modules(text * (1_000_000 // len(text)))) == []  # (how long it takes: `python -m bench parsing`)


def test_blocks_are_left_out_and_nothing_else() -> None:
    text = (
        '# moved {\nmoved {\n  from = a["}"]\n  to = b\n}\nresource "moved" "x" {\n  moved {}\n}\n'
        "import { to = a } # x\nx = <<E\nmoved {\n}\nE\nremoved {"
    )
    assert without(text, ("moved", "import", "removed")) == (
        '# moved {\n\n\n\n\nresource "moved" "x" {\n  moved {}\n}\n # x\nx = <<E\nmoved {\n}\nE\nremoved {'
    )
    assert json_without('{"moved": [], "locals": {}}', ("moved",)) == '{"locals": {}}'
    for other in ('{"locals":  {}}', "[1]", "{"):
        assert json_without(other, ("moved",)) == other
