"""`proctor status`."""

from __future__ import annotations

import sys
import time
from typing import Final

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option
from proctor.errors import LaunchError
from proctor.report.layout import show_all
from proctor.report.verbs import forecast_table, jobs_table, starts_table, status_table, worker_table
from proctor.report.views import RunStatus

MANY: Final = 20
"""So many tasks are too many to look through: without --detailed they are added up for each model."""
WATCH_S: Final = 10.0
"""Between two looks: what a shared file system and a scheduler can bear."""


@click.command()
@config_argument
@set_option
@json_option
@click.option("--detailed", is_flag=True, help="Every task of every model, however many there are.")
@click.option("--watch", is_flag=True, help="Look again every ten seconds until nothing is owed or at work.")
def command(config: str, overrides: tuple[str, ...], *, as_json: bool, detailed: bool, watch: bool) -> int:
    """Show how far the run of CONFIG is. Reads the store and the queue; changes nothing.

    Ctrl-C ends --watch.
    """
    try:
        return _look(config, overrides, as_json=as_json, detailed=detailed, watch=watch)
    except KeyboardInterrupt:
        if not watch:
            raise
        click.echo(err=True)  # the terminal has written ^C
        return 0


def _look(config: str, overrides: tuple[str, ...], *, as_json: bool, detailed: bool, watch: bool) -> int:
    while True:
        status = api.status(config, overrides)
        if watch and not as_json and sys.stdout.isatty():
            click.clear()
        if as_json:
            print_json(status)
        else:
            _show(status, detailed=detailed or len(status.tasks) <= MANY)
        if status.queue_unread is not None:
            click.echo(f"error: {status.queue_unread}", err=True)
            if not watch:
                return LaunchError.exit_code
        if not watch or not (status.owed or _at_work(status) or status.queue_unread):
            return 0
        time.sleep(WATCH_S)


def _show(status: RunStatus, *, detailed: bool) -> None:
    tables = [status_table(status, detailed=detailed)]
    if status.jobs:
        tables.append(jobs_table(status))
    if status.plan and detailed:
        tables.append(forecast_table(status))
    if status.starts and detailed:
        tables.append(starts_table(status))
    if status.workers:
        tables.append(worker_table(status))
    show_all(tables, sys.stdout)


def _at_work(status: RunStatus) -> bool:
    return any(j.pending or j.running for j in status.jobs)
