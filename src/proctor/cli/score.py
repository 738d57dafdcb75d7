"""`proctor score`."""

from __future__ import annotations

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option
from proctor.cli.scores import show_scores
from proctor.errors import Incomplete


@click.command()
@config_argument
@set_option
@json_option
@click.option("--samples", is_flag=True, help="With --json: also every document with prompt, answers and metrics.")
def command(config: str, overrides: tuple[str, ...], as_json: bool, samples: bool) -> int:
    """Mark the answers that CONFIG's run has so far. Needs no model, GPU or network."""
    scores = api.score(config, overrides)
    if as_json:
        print_json(api.scores_to_json(scores, samples=samples))
    else:
        show_scores(scores, title=scores.run)
    if scores.complete:
        return 0
    click.echo("incomplete: some scores do not stand on all of their documents", err=True)
    return Incomplete.exit_code
