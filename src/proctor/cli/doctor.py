"""`proctor doctor`."""

from __future__ import annotations

import asyncio
import sys

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option
from proctor.cli.watching import watching
from proctor.report.clusters import finding_table
from proctor.report.layout import show


@click.command()
@config_argument
@set_option
@json_option
@click.option("--no-job", is_flag=True, help="Only look; start nothing.")
@click.option("--wait", type=click.FloatRange(min=0.1), default=30.0, show_default=True, help="Minutes for the job.")
@click.option("--quiet", is_flag=True, help="No progress on standard error.")
def command(config: str, overrides: tuple[str, ...], *, as_json: bool, no_job: bool, wait: float, quiet: bool) -> int:
    """See whether CONFIG will work here: its file, store, tasks, models and cluster, and one small job as proof.

    What the job is answered is kept and not asked again.
    """
    with watching(sys.stderr, quiet=quiet or as_json) as progress:
        found = asyncio.run(api.doctor(config, overrides, trial=not no_job, wait_s=60 * wait, progress=progress))
    if as_json:
        print_json({"run": found.run, "healthy": found.healthy, "findings": found.findings})
    else:
        show(finding_table(found.run, found.findings), sys.stdout)
    return 0 if found.healthy else 1
