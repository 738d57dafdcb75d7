"""`proctor submit`."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option
from proctor.cli.watching import watching
from proctor.errors import Incomplete
from proctor.report.layout import show
from proctor.report.submission import submission_table


@click.command()
@config_argument
@set_option
@json_option
@click.option("--dry-run", is_flag=True, help="Show the scripts and what would be sent; send nothing.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many array elements.")
@click.option("--model", "models", multiple=True, help="Only this model or checkpoint; can be repeated.")
@click.option("--retry-failed", is_flag=True, help="Ask again what failed for good (refused, too long, ...).")
@click.option(
    "--reason", "reasons", multiple=True, help="With --retry-failed: only failures at this boundary; can be repeated."
)
@click.option(
    "--retry-interval", type=click.FloatRange(min=0.01), help="Minutes after which what a limit kept out is sent again."
)
@click.option("--quiet", is_flag=True, help="No progress on standard error.")
def command(
    config: str,
    overrides: tuple[str, ...],
    *,
    as_json: bool,
    dry_run: bool,
    retry_interval: float | None,
    quiet: bool,
    **selection: Any,
) -> int:
    """Send workers to the cluster for everything that CONFIG still owes.

    What is done, waiting or running is not sent again; repeat the command to continue, after whatever happened.
    """
    select = api.Selection(**selection)
    if select.reasons and not select.retry_failed:
        raise click.UsageError("--reason needs --retry-failed")
    while True:
        with watching(sys.stderr, quiet=quiet or as_json) as progress:
            outcome = asyncio.run(api.submit(config, overrides, select=select, dry_run=dry_run, progress=progress))
        if as_json:
            print_json(api.submission_to_json(outcome))
        else:
            _say(outcome, dry_run=dry_run)
        if not outcome.owed or retry_interval is None:
            break
        time.sleep(60 * retry_interval)
    return Incomplete.exit_code if outcome.owed else 0


def _say(outcome: api.SubmitOutcome, *, dry_run: bool) -> None:
    if not outcome.arrays:
        click.echo("nothing is owed")
        _warn(outcome)
        return
    if dry_run:
        for array in outcome.arrays:
            click.echo(f"# {array.name}: {array.missing} elements\n{array.script}")
        if outcome.scoring:
            click.echo(f"# afterwards\n{outcome.scoring}")
    show(submission_table(outcome.arrays), sys.stdout)
    for array in outcome.arrays:
        for line in array.overrides:
            click.echo(f"  {line}")
    if outcome.sent:
        click.echo("sent: " + ", ".join(f"{s.job} ({s.shape}, {s.elements})" for s in outcome.sent))
    elif not dry_run:
        click.echo("nothing to send: all of it waits or runs already")
    _warn(outcome)
    if outcome.stopped_by is not None:
        click.echo(f"error: {outcome.stopped_by}", err=True)
    if outcome.owed:
        click.echo(f"incomplete: {outcome.owed} elements are not in the queue", err=True)


def _warn(outcome: api.SubmitOutcome) -> None:
    for warning in outcome.warnings:
        click.echo(f"warning: {warning}", err=True)
