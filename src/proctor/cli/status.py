"""`proctor status`."""

from __future__ import annotations

import sys

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option
from proctor.report.layout import show
from proctor.report.verbs import status_table, worker_table


@click.command()
@config_argument
@set_option
@json_option
def command(config: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Show how far the run of CONFIG is. Reads the store; changes nothing."""
    status = api.status(config, overrides)
    if as_json:
        print_json(status)
    else:
        show(status_table(status), sys.stdout)
        if status.workers:
            show(worker_table(status), sys.stdout)
    return 0
