"""`proctor models`."""

from __future__ import annotations

import sys

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option
from proctor.report.layout import Layout, Line, heading, show


@click.command()
@config_argument
@set_option
@json_option
@click.option(
    "--fetch", metavar="NAME", help="Bring embedded:NAME, or a hub id [@REVISION], to this machine; no CONFIG."
)
def command(config: str, overrides: tuple[str, ...], as_json: bool, fetch: str | None) -> int:
    """List the models and checkpoints of CONFIG with the fingerprint of their weights."""
    if fetch is not None:
        path = api.fetch_model(fetch)
        if as_json:
            print_json({"name": fetch, "path": str(path)})
        else:
            click.echo(str(path))
        return 0
    found = api.models(config, overrides)
    if as_json:
        print_json([{"entry": entry, "weights": weights} for entry, weights in found])
        return 0
    lines = tuple(
        Line(
            cells=(
                e.display_name,
                e.label,
                "-" if e.step is None else str(e.step),
                "-" if e.tokens_trained is None else f"{e.tokens_trained:,}",
                e.kind.value,
                weights[:12],
                e.source,
            )
        )
        for e, weights in found
    )
    names = ("model", "checkpoint", "step", "tokens", "kind", "weights", "path")
    show(Layout(title="models", columns=heading(*names, right=("step", "tokens")), lines=lines, notes=()), sys.stdout)
    return 0
