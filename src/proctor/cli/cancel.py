"""`proctor cancel`."""

from __future__ import annotations

import asyncio

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option


@click.command()
@config_argument
@set_option
@json_option
def command(config: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """End every job of the run of CONFIG on the cluster. What was answered is kept; `proctor submit` continues."""
    ended = asyncio.run(api.cancel(config, overrides))
    if as_json:
        print_json({"cancelled": ended})
    elif ended:
        click.echo(f"cancelled {len(ended)} jobs: {', '.join(ended[:10])}{', …' if len(ended) > 10 else ''}")
    else:
        click.echo("no job of this run waits or runs")
    return 0
