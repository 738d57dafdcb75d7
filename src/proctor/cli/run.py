"""`proctor run`."""

from __future__ import annotations

import asyncio
import sys

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option
from proctor.cli.scores import show_scores
from proctor.cli.watching import watching
from proctor.errors import Incomplete


@click.command()
@config_argument
@set_option
@json_option
@click.option("--retry-failed", is_flag=True, help="Ask again what failed for good (refused, too long, ...).")
@click.option("--fresh", is_flag=True, help="Record the tasks anew, even if nothing they are made from has changed.")
@click.option("--quiet", is_flag=True, help="No progress on standard error.")
def command(
    config: str, overrides: tuple[str, ...], *, as_json: bool, retry_failed: bool, fresh: bool, quiet: bool
) -> int:
    """Do everything that CONFIG still owes, then print the scores.

    Ctrl-C once finishes and keeps what is in flight; twice stops at once. Repeat the command to continue.
    """
    with watching(sys.stderr, quiet=quiet or as_json) as progress:
        outcome = asyncio.run(api.run(config, overrides, progress=progress, retry_failed=retry_failed, fresh=fresh))
    if as_json:
        print_json(api.outcome_to_json(outcome))
    else:
        show_scores(outcome.scores, title=outcome.run)
    for error in outcome.errors:
        click.echo(f"error: {error}", err=True)
    if outcome.errors:
        return max(outcome.errors, key=lambda e: e.exit_code == 1).exit_code
    if outcome.complete:
        return 0
    hint = "\n  → repeat the command to continue" if outcome.after.owed else ""
    click.echo(f"incomplete: {api.owed_words(outcome)}{hint}", err=True)
    return Incomplete.exit_code
