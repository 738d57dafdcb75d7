"""`proctor status`."""

from __future__ import annotations

import sys
import time
from typing import Final

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option
from proctor.errors import LaunchError
from proctor.report.layout import show
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
    """Show how far the run of CONFIG is. Reads the store and the queue; changes nothing."""
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
            return LaunchError.exit_code
        if not watch or not (status.owed or _at_work(status)):
            return 0
        time.sleep(WATCH_S)


def _show(status: RunStatus, *, detailed: bool) -> None:
    show(status_table(status, detailed=detailed), sys.stdout)
    if status.jobs:
        show(jobs_table(status), sys.stdout)
    if status.plan and detailed:
        show(forecast_table(status), sys.stdout)
    if status.starts and detailed:
        show(starts_table(status), sys.stdout)
    if status.workers:
        show(worker_table(status), sys.stdout)


def _at_work(status: RunStatus) -> bool:
    return any(j.pending or j.running for j in status.jobs)
