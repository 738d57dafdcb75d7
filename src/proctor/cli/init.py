"""`proctor init`."""

from __future__ import annotations

from pathlib import Path

import click

from proctor import api
from proctor.config.starter import QUESTIONS


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), default=".")
@click.option("--interactive", is_flag=True, help="Ask for the model, the tasks and the rest.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
def command(directory: Path, interactive: bool, force: bool) -> int:
    """Write an annotated run.yaml to DIRECTORY; without questions, one that runs on the embedded model."""
    answers = _ask() if interactive else None
    written = api.init(directory, answers, force=force)
    for path in written:
        click.echo(f"wrote {path}")
    click.echo(f"next: proctor run {written[0]}")
    return 0


def _ask() -> dict[str, str]:
    answers: dict[str, str] = {}
    for question in QUESTIONS:
        if not question.asked(answers):
            continue
        while True:
            answer: str = click.prompt(question.text, default=question.default, show_default=bool(question.default))
            complaint = question.check(answer)
            if complaint is None:
                answers[question.key] = answer
                break
            click.echo(complaint, err=True)
    return answers
