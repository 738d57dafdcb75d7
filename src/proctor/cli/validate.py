"""`proctor validate`."""

from __future__ import annotations

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option


@click.command()
@config_argument
@set_option
@json_option
@click.option("--schema", is_flag=True, help="Print the JSON Schema of run.yaml for editors, and stop.")
@click.option("--resolved", is_flag=True, help="Print the configuration with everything spelt out.")
def command(config: str, overrides: tuple[str, ...], as_json: bool, schema: bool, resolved: bool) -> int:
    """Check CONFIG: keys and values, models and their weights. Runs nothing and writes nothing."""
    if schema:
        print_json(api.json_schema())
        return 0
    checked = api.validate(config, overrides)
    if resolved:
        click.echo(checked.resolved, nl=False)
    elif as_json:
        print_json({"valid": True, "run": checked.run, "models": checked.models, "tasks": checked.tasks})
    else:
        click.echo(f"{config} is valid: {len(checked.models)} models, {checked.tasks} task entries")
    return 0
