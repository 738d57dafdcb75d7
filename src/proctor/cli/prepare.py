"""`proctor prepare`."""

from __future__ import annotations

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option


@click.command()
@config_argument
@set_option
@json_option
def command(config: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """Record the requests of CONFIG's tasks and prove each on fake answers with the network blocked."""
    prepared = api.prepare(config, overrides)
    if as_json:
        print_json(prepared)
        return 0
    for task in prepared:
        needs = f"; needs {', '.join(task.labels)}" if task.labels else ""
        click.echo(f"{task.task} ({task.num_fewshot} shots): {task.requests} requests, proven offline{needs}")
    return 0
