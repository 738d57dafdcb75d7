"""`proctor plan`."""

from __future__ import annotations

import sys

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option
from proctor.report.layout import show
from proctor.report.verbs import plan_table


@click.command()
@config_argument
@set_option
@json_option
@click.option("--retry-failed", is_flag=True, help="Count what failed for good as owed.")
def command(config: str, overrides: tuple[str, ...], as_json: bool, retry_failed: bool) -> int:
    """Show what CONFIG asks, what is answered already, what is owed and what that costs. Asks nothing."""
    plan = api.plan(config, overrides, retry_failed=retry_failed)
    if as_json:
        print_json(api.plan_to_json(plan))
    else:
        show(plan_table(plan), sys.stdout)
    return 0
