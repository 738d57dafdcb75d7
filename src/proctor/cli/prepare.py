"""`proctor prepare`."""

from __future__ import annotations

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option


@click.command()
@config_argument
@set_option
@click.option(
    "--full-checksums/--quick-checksums",
    default=None,
    help="Whether workers compare every byte of the files they need, or size and samples (default: as before).",
)
@json_option
def command(config: str, overrides: tuple[str, ...], full_checksums: bool | None, as_json: bool) -> int:
    """Bring what CONFIG needs and is not here, record its tasks' requests, and prove each with the network blocked."""
    prepared = api.prepare(config, overrides, full_checksums=full_checksums)
    if as_json:
        print_json(prepared)
        return 0
    for task in prepared:
        needs = f"; needs {', '.join(task.labels)}" if task.labels else ""
        click.echo(f"{task.task} ({task.num_fewshot} shots): {task.requests} requests, proven offline{needs}")
    return 0
