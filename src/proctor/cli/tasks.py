"""`proctor tasks`."""

from __future__ import annotations

import click

from proctor import api
from proctor.cli.options import print_json


@click.command()
@click.argument("pattern", default="")
@click.option("--source", type=click.Choice(["lm_eval", "native"]), help="Only this source.")
@click.option("--include", multiple=True, type=click.Path(), help="A directory with further lm-eval tasks.")
@click.option("--python", help="Interpreter that has lm-eval, where this one has not.")
@click.option("--kind", type=click.Choice(["task", "group", "tag", "file"]), help="Only these.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def command(
    pattern: str, source: str | None, include: tuple[str, ...], python: str | None, kind: str | None, as_json: bool
) -> int:
    """List the names that contain PATTERN, or match it as a glob (mmlu_*)."""
    found = api.search_tasks(pattern, source=source, include=include, python=python)
    found = [t for t in found if kind is None or t.kind == kind]
    if as_json:
        print_json(found)
        return 0
    click.echo("".join(f"{t.name}\t{t.kind}\t{t.source}\n" for t in found), nl=False)
    click.echo(f"{len(found)} names", err=True)
    if source is None and not api.has_lm_eval(python):
        click.echo("lm-eval is not in this environment; --python names an interpreter that has it", err=True)
    return 0
