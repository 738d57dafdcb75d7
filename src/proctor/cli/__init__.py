"""The command line. One file per verb: parse, call api, print."""

from __future__ import annotations

import importlib
import sys
from typing import Final

import click

from proctor import __version__
from proctor.processes.garbage import collect_seldom

VERBS: Final = {
    "init": "Write an annotated run.yaml.",
    "validate": "Check a run.yaml without running anything.",
    "tasks": "List and search tasks.",
    "models": "List the models and checkpoints of a run; fetch the embedded one.",
    "prepare": "Bring what a run needs; record its tasks and prove that they can be marked offline.",
    "plan": "Show what is owed and what it will cost.",
    "run": "Do everything that is still owed, then print the scores.",
    "submit": "Send workers to a Slurm cluster for everything that is still owed.",
    "status": "Show how far a run is.",
    "logs": "Show what jobs, workers and servers wrote, and which samples failed.",
    "cancel": "End the jobs of a run on the cluster.",
    "claims": "Show which attempts hold requests; give back those of a dead one.",
    "score": "Mark the answers that are there. Needs no model.",
    "doctor": "See whether a run will work here, and prove it by one small job.",
    "clusters": "List, show, detect and check cluster profiles.",
}
"""Verb → help. Listed here so that --help imports nothing."""


class Verbs(click.Group):
    """Imports a verb's module only when that verb is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"proctor.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            from proctor.errors import UnknownName  # noqa: PLC0415

            raise click.UsageError(UnknownName.among("verb", args[0], VERBS).message, ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="proctor")
def cli() -> None:
    """Proctor runs evaluations of language models: it plans, serves, resumes and scores.

    Every verb can be repeated: it does what is still owed and nothing else.
    Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 work still owed.
    """


def main() -> None:
    """The entry point."""
    collect_seldom()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; return the exit code. Errors that we raise are printed, never a traceback."""
    try:
        result = cli.main(args=arguments, prog_name="proctor", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        return 130
    except click.ClickException as error:
        click.echo(_usage(error), err=True)
        return 2
    except Exception as error:
        from proctor.errors import ProctorError  # noqa: PLC0415

        if not isinstance(error, ProctorError):
            raise
        click.echo(f"error: {error}", err=True)
        return error.exit_code


def _usage(error: click.ClickException) -> str:
    """The parser's complaint in the form of ours."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context is not None else "proctor"
    return f"error: {error.format_message()}\n  → `{command} --help` shows what can be given"
