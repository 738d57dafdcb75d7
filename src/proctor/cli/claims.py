"""`proctor claims`."""

from __future__ import annotations

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option

_WORDS = {True: "runs", False: "over", None: "cannot be told from here"}


@click.command()
@config_argument
@set_option
@click.option(
    "--void", "attempt", metavar="ATTEMPT", help="Give back what this attempt holds: you vouch that it is dead."
)
@json_option
def command(config: str, overrides: tuple[str, ...], attempt: str | None, as_json: bool) -> int:
    """Show which attempts hold requests in the store of CONFIG, and whether they still run."""
    found = api.claims(config, overrides) if attempt is None else api.void_claims(config, attempt, overrides)
    if as_json:
        print_json(found)
        return 0
    for one in found:
        whose = f" of {one.user}" if one.user else ""
        word = "void now" if attempt is not None else _WORDS[one.alive]
        run = f", run {one.run}" if one.run else ""
        click.echo(f"{one.attempt}{whose} on {one.host}{run}: {one.requests} requests of {one.weights[:12]}; {word}")
    if not found:
        click.echo("nobody holds a claim in this store")
    return 0
