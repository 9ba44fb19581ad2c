"""The command line about itself: a shell's completion, the man page and docs/cli.md, all from the verbs' own help."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from typer import Argument, Context, Option
from typer._completion_shared import get_completion_script

from toto import __version__
from toto.cli.verbs import COMPLETE, SECTIONS, Verbs, everything, load, parameters

verbs = Verbs()

STATUSES: Final = {
    "0": "all is well",
    "1": "what was asked for failed: a host does not evaluate, a run failed or was cancelled",
    "2": "it could not be tried, or how it ended is not known: wrong words, bad input, a tool or a server that fails; "
    "and of `toto plan --exit-code`: something would change",
    "3": "a run is done only in part",
    "130": "interrupted, by Ctrl-C",
    "141": "whoever read the output had enough, as in `toto log | head -1`",
}
ENVIRONMENT: Final = {
    "TOTO_URL": "the address of the UI of a toto on a different machine, with its user and password, like "
    "`https://USER:PASSWORD@toto.example.org`; or the password is in `~/.netrc`",
    "TOTO_SSH": "the name of its git host for ssh; default: `toto`",
    "TOTO_STATE": "the folder of toto's state; default: `~/.local/state/toto`",
    "NO_COLOR": "when it is set, nothing is coloured",
    "COLUMNS": "the width for which output is laid out, where it is not the terminal's",
}
INTRODUCTION: Final = """\
`toto` is run on toto's own machine, as the user of toto's server. It finds the infra repo that is meant: the one that
`--repo` names, that of the current folder, or the only one there is. Users of the git host have some of the verbs over
ssh, as in `ssh toto deploy web1`.

On a different machine, with `TOTO_URL` set, `toto status`, `toto log`, `toto runs` and `toto run logs` read from there.
The verbs of the git host go over ssh, in the name of your key's user: `toto deploy web1` is `ssh toto deploy web1`."""
JSON: Final = """\
With `--json` a verb prints one document on standard output: `{"toto": 1, "kind": KIND, "items": [ITEM, …]}`. The number
grows when an item is no longer what its readers know; fields that are added do not count. When it fails, the kind is
`error`, and its one item has `message`, `target` and `hint` (each a text, or null) and `status`, the exit status. What
toto tells of on its way is on standard error."""


@dataclass(frozen=True)
class _Entry:
    """A verb, or a verb of a verb: its words, usage, description, and its parameters by title."""

    words: str
    usage: str
    text: list[str]
    parameters: dict[str, list[tuple[str, str]]]


@verbs.verb("completion")
def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Argument(metavar="SHELL")]) -> int:
    """Print what makes a shell complete the words of toto: bash, zsh or fish.

    bash: toto completion bash > ~/.local/share/bash-completion/completions/toto

    zsh: toto completion zsh > a file named _toto in a folder of $fpath

    fish: toto completion fish > ~/.config/fish/completions/toto.fish
    """
    print(get_completion_script(prog_name="toto", complete_var=COMPLETE, shell=shell))
    return 0


@verbs.verb("man")
def man(
    markdown: Annotated[bool, Option("--markdown", help="print the same as Markdown: it is docs/cli.md")] = False,
) -> int:
    """Print this command's man page: toto man | man -l -"""
    print(as_markdown() if markdown else as_man_page())
    return 0


def as_markdown() -> str:
    """All verbs, for docs/cli.md."""
    lines = ["# The command line", "", INTRODUCTION, "", "`toto man --markdown` writes this page.", ""]
    for section, entries in _sections():
        lines += [f"## {section}", ""]
        for each in entries:
            lines += [f"### toto {each.words}", "", f"    {each.usage}", ""]
            lines += [line for paragraph in each.text for line in (_markdown(paragraph), "")]
            for name, text in [pair for pairs in each.parameters.values() for pair in pairs]:
                lines.append(f"- `{name}`" + (f": {_markdown(text)}" if text else ""))
            lines += [""] if each.parameters else []
    lines += ["## JSON", "", JSON, ""]
    for title, table in (("Exit status", STATUSES), ("Environment", ENVIRONMENT)):
        lines += [f"## {title}", "", "| | |", "| --- | --- |"]
        lines += [f"| `{name}` | {text} |" for name, text in table.items()]
        lines.append("")
    return "\n".join(lines[:-1])


def _markdown(text: str) -> str:
    """Text in which nothing but what is within backquotes looks like markup."""
    parts = text.split("`")
    return "`".join(part if at % 2 else re.sub(r"([*_<>\[\]])", r"\\\1", part) for at, part in enumerate(parts))


def as_man_page() -> str:
    """All verbs, as man(1) reads it."""
    lines = [f'.TH TOTO 1 "" "toto {__version__}"', ".SH NAME", r"toto \- deploys a fleet of NixOS machines"]
    lines += [".SH SYNOPSIS", ".B toto", "VERB ...", ".SH DESCRIPTION", _roff(INTRODUCTION).replace("\n\n", "\n.PP\n")]
    for section, entries in _sections():
        lines.append(f".SH {section.upper()}")
        for each in entries:
            lines += [f".SS toto {_roff(each.words)}", f".B {_roff(each.usage)}"]
            lines += [line for paragraph in each.text for line in (".PP", _roff(paragraph))]
            for name, text in [pair for pairs in each.parameters.values() for pair in pairs]:
                lines += [".TP", f".B {_roff(name)}", _roff(text) or r"\&"]
    lines += [".SH JSON", _roff(JSON)]
    for title, table in (("EXIT STATUS", STATUSES), ("ENVIRONMENT", ENVIRONMENT)):
        lines.append(f".SH {title}")
        for name, text in table.items():
            lines += [".TP", f".B {name}", _roff(text)]
    return "\n".join(lines)


def _roff(text: str) -> str:
    text = text.replace("`", "").replace("…", "...").replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"(?m)^([.'])", r"\\&\1", text)


def _sections() -> Iterator[tuple[str, list[_Entry]]]:
    top = Context(everything(), info_name="toto")
    for section, names in SECTIONS.items():
        yield section.capitalize(), [entry for name in names for entry in _entries(load(name), name, top)]


def _entries(command: Any, name: str, parent: Context) -> Iterator[_Entry]:
    context = Context(command, info_name=name, parent=parent)
    words = context.command_path.removeprefix("toto ")
    if below := getattr(command, "commands", None):
        for each in below.values():
            yield from _entries(each, each.name, context)
        return
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    text = [" ".join(paragraph.split()) for paragraph in (command.help or "").split("\n\n")]
    yield _Entry(words, usage, text, parameters(command, context))
