"""The verbs of the command `toto`: which there are, what each is for, and in which module it is.

A verb's module is imported when the verb is called, so that `toto --help` and a shell's completion are quick. A new
verb is a line of `SECTIONS` and a function of its module:

    verbs = Verbs()

    @verbs.verb("plan")
    async def plan(…) -> int:
        '''Show what a commit would change, and why; touch nothing.'''

It returns its exit status. The first line of what it says of itself is the line here (a test compares them).
"""

import difflib
import functools
import os
import re
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Annotated, Any, Final, ParamSpec, TypeVar

import typer
from typer._completion_classes import completion_init
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import Exit, TyperException
from typer.main import get_group

from toto import __version__
from toto.cli.failure import tell

SECTIONS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "the fleet": {
        "plan": ("toto.cli.plan", "show what a commit would change, and why; touch nothing"),
        "diff": (
            "toto.cli.plan",
            "show what a commit would change in one target, from its last good on; touch nothing",
        ),
        "status": (
            "toto.cli.fleet",
            "show every target, one a line: what it runs, its last run, and what a person should know of it",
        ),
        "log": ("toto.cli.fleet", "show the deployment history, newest first"),
    },
    "deploying": {
        "deploy": (
            "toto.cli.deploy",
            "have toto deploy what changed, as a push does; over ssh: ssh toto deploy [TARGET …]",
        ),
        "rehearse": (
            "toto.cli.deploy",
            "have toto rehearse what changed, and touch nothing; over ssh: ssh toto rehearse [TARGET …]",
        ),
        "revert": ("toto.cli.deploy", "deploy what was deployed before; over ssh: ssh toto revert [COMMIT|TARGET]"),
        "freeze": (
            "toto.cli.deploy",
            "have targets rehearsed and not rolled out, until toto unfreeze; "
            "over ssh: ssh toto freeze TARGET … --reason WHY",
        ),
        "unfreeze": ("toto.cli.deploy", "let targets be rolled out again; over ssh: ssh toto unfreeze TARGET …"),
    },
    "runs": {
        "runs": ("toto.cli.runs", "list the newest runs of all repositories: how each ended, and what it said"),
        "run": ("toto.cli.runs", "the log of a run"),
        "cancel": ("toto.cli.runs", "cancel a run: what it is rolling out is put back; over ssh: ssh toto cancel RUN"),
        "job": ("toto.cli.jobs", "the jobs of a repository: list and start them, read their logs, abort them"),
        "check": (
            "toto.cli.runs",
            "check machines by the InSpec profiles and testinfra modules of their repository; over ssh: ssh toto check",
        ),
        "build": (
            "toto.cli.build",
            "have toto build a host, and touch nothing; over ssh: ssh toto build HOST[@COMMIT]",
        ),
        "fetch": (
            "toto.cli.build",
            "write what was built to standard output: a tar of a binary cache; over ssh: ssh toto fetch HOST[@COMMIT]",
        ),
        "wait": ("toto.cli.runs", "print a run's progress until it ends; over ssh: ssh toto wait RUN"),
        "approve": ("toto.cli.runs", "let a run go on that asks for an approval; over ssh: ssh toto approve RUN"),
        "reject": ("toto.cli.runs", "refuse what a run asks for; over ssh: ssh toto reject RUN"),
        "accept": (
            "toto.cli.runs",
            "take what is there as good, where a target cannot be put back; over ssh: ssh toto accept TARGET …",
        ),
    },
    "trying a host": {
        "init": ("toto.cli.init", "write machines.yaml, in this folder, from the hosts that are found in it"),
        "sandbox": ("toto.cli.sandbox", "boot a host's virtual machine, and be root in it until you leave"),
        "test": ("toto.cli.sandbox", "run a host's test scripts of one phase, and nothing else"),
        "tap": ("toto.cli.sandbox", "tell what toto thinks of a TAP document, as a test script prints it"),
    },
    "the git host, keys and machines": {
        "repo": ("toto.cli.repo", "the git host: repositories, what they accept, who may use them"),
        "key": ("toto.cli.key", "print the public half of a key of a repository's"),
        "machine": ("toto.cli.machine", "which repository may deploy which machine"),
    },
    "the server": {
        "serve": ("", "run toto: Prefect's server, a worker, the deployments (--help says more)"),
        "nix-daemon": ("", "run toto's nix daemon, as root, for a `toto serve` that is not (--help)"),
        "doctor": ("toto.cli.doctor", "tell what toto lacks on this machine, and what mends it"),
        "password": ("toto.cli.server", "print user and password of UI and API: an administrator's"),
        "metrics": ("toto.cli.metrics", "what a Prometheus needs to read toto and the fleet's machines"),
        "backup": ("toto.cli.server", "write all that cannot be made again to a file, also while toto runs"),
        "restore": ("toto.cli.server", "put a backup in the place of what is there, while toto does not run"),
        "database": ("toto.cli.database", "move Prefect's database to PostgreSQL, or to a newer one"),
        "migrate": ("toto.cli.server", "take the state of a toto that ran as root to a user of its own"),
    },
    "this command": {
        "completion": ("toto.cli.about", "print what makes a shell complete the words of toto: bash, zsh or fish"),
        "man": ("toto.cli.about", "print this command's man page: toto man | man -l -"),
    },
}
VERBS: Final = {verb: line for section in SECTIONS.values() for verb, line in section.items()}
"""The module (`""` for what `toto.cli` starts itself) and the line of help of each verb."""


OVER_SSH: Final = frozenset(
    (
        *("deploy", "rehearse", "revert", "freeze", "unfreeze", "check", "build", "fetch", "job"),
        *("wait", "cancel", "approve", "reject", "accept"),
    )
)
"""What the git host of a different toto does, over ssh: `toto.git_host.shell` admits it."""

COMPLETE: Final = "_TOTO_COMPLETE"
_P = ParamSpec("_P")
_Status = TypeVar("_Status", int, Coroutine[Any, Any, int])


class Group(TyperGroup):
    """Says of a wrong word what was meant, and not all that there is."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, n=1)
            meant = f"did you mean {close[0]}?" if close else f"`{ctx.command_path} --help` lists what there is"
            ctx.fail(f"there is no {args[0][:60]!a}: {meant}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])


class _All(Group):
    """All verbs: only their lines of help, until one is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and load(name), rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        with formatter.section("Options"):
            formatter.write_dl(parameters(self, ctx)["Options"])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for section, verbs in SECTIONS.items():
            with formatter.section(section.capitalize()):
                formatter.write_dl([(verb, line) for verb, (_, line) in verbs.items()])


class Verb(TyperCommand):
    """A verb without verbs of its own."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [re.sub(r"^\{(.*)\}", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for title, lines in parameters(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl(lines)


def parameters(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:
    """The arguments and the options of a verb, each with its line of help; what it does not have is left out."""
    found: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for each in command.get_params(ctx):
        if (record := each.get_help_record(ctx)) is None:
            continue
        name, text = record
        text = re.sub(r"; (\d+<=)?x[<>]=?\d+(?=\])", "", text)  # a range, which an error tells
        if each.param_type_name == "argument":
            found["Arguments"].append((name.partition(" <")[0], re.sub(r" *\[required\]$", "", text)))
        elif each.name == "help":
            found["Options"].append((name, "show this, and exit"))
        else:
            text = re.sub(r" *\[default: \((.*)\)\]$| *\[default: (.*)\]$", r" (default: \1\2)", text)
            found["Options"].append((name, re.sub(r" *\[required\]$", " (required)", text)))
    return {title: lines for title, lines in found.items() if lines}


class Verbs(typer.Typer):
    """A group of verbs, whose functions may be async; each returns its exit status."""

    def __init__(self, help: str | None = None) -> None:
        super().__init__(
            cls=Group,
            help=help,
            add_completion=False,
            rich_markup_mode=None,
            subcommand_metavar="VERB …",
            options_metavar="",
        )

    def group(self, name: str) -> "Verbs":
        """Make a verb that has verbs of its own."""
        made = Verbs(VERBS[name][1])
        self.add_typer(made, name=name)
        return made

    def verb(self, name: str) -> Callable[[Callable[_P, _Status]], Callable[_P, _Status]]:
        """Make a function a verb. It stays what it is for whoever calls it."""

        def add(function: Callable[_P, _Status]) -> Callable[_P, _Status]:
            @functools.wraps(function)
            def called(*args: _P.args, **kwargs: _P.kwargs) -> int:
                done = function(*args, **kwargs)
                if isinstance(done, int):
                    return done
                import asyncio  # noqa: PLC0415  (a fifth of the time that `toto --help` takes)

                return asyncio.run(done)

            self.command(name, cls=Verb, options_metavar="[OPTIONS]")(called)
            return function

        return add


def load(verb: str) -> Any:
    """The command of a verb, from its module."""
    module, line = VERBS[verb]
    return get_group(import_module(module).verbs).commands[verb] if module else Verb(verb, help=line)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"toto {__version__}")
        raise Exit


def everything() -> TyperGroup:
    """The command `toto`, whose verbs are not loaded yet."""
    toto = typer.Typer(
        cls=_All,
        name="toto",
        add_completion=False,
        rich_markup_mode=None,
        subcommand_metavar="VERB …",
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="The exit status is 0 when all is well, 1 when what was asked for failed, 2 when it could not be tried, "
        "3 when only a part is done. `toto man` tells more.",
    )
    toto.callback()(_toto)
    group = get_group(toto)
    group.commands = {verb: Verb(verb, short_help=line) for verb, (_, line) in VERBS.items()}
    return group


def _toto(
    version: Annotated[
        bool, typer.Option("--version", help="print the version, and exit", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Deploy a fleet of NixOS machines: show what would change and what is deployed, deploy it, put it back.

    A push to the infra repo starts a run by itself, and so does Prefect's UI.
    """


def run(words: list[str]) -> int:
    """Do what the words of a command line say; the exit status."""
    toto = everything()
    if COMPLETE in os.environ:  # (what `toto completion` prints asks by it)
        completion_init()
        toto.main(words, "toto", COMPLETE)
    try:
        with toto.make_context("toto", words) as context:
            return int(toto.invoke(context) or 0)
    except Exit as exit:
        return exit.exit_code
    except TyperException as error:
        where = getattr(error, "ctx", None)
        message = error.format_message().rstrip(".")
        return tell(words, f"{message[:1].lower()}{message[1:]}", by=where.command_path if where else "toto")
