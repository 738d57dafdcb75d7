"""`proctor logs`."""

from __future__ import annotations

import sys
import time

import click

from proctor import api
from proctor.cli.options import config_argument, json_option, print_json, set_option
from proctor.report.layout import Layout, Line, heading, show
from proctor.report.text import count, duration, shown


@click.command()
@config_argument
@click.argument("name", required=False)
@set_option
@json_option
@click.option("--failed", is_flag=True, help="Samples that failed for good, with prompt and reason.")
@click.option("-n", "--lines", type=click.IntRange(min=1), default=40, show_default=True, help="Lines of each log.")
def command(
    config: str, name: str | None, overrides: tuple[str, ...], *, as_json: bool, failed: bool, lines: int
) -> int:
    """List the logs of the run of CONFIG, or print the end of those whose name contains NAME.

    NAME is a job (12_3), a worker, a model or a server's log, or any part of one.
    """
    if failed:
        _show_failed(config, overrides, name, as_json=as_json)
        return 0
    files = api.log_files(config, overrides, name=name)
    if as_json:
        print_json([{"file": f, "end": api.last_lines(f, lines) if name else None} for f in files])
    elif name is None:
        _list(files)
    else:
        for file in files:
            end = api.last_lines(file, lines)
            click.echo(f"==> {shown(str(file.path))} <==\n{end or '(nothing was written)'}")
    return 0


def _list(files: list[api.LogFile]) -> None:
    now = time.time()
    lines = tuple(
        Line(cells=(f.name, f.kind, count(f.size), f"{duration(now - f.modified)} ago")) for f in files if f.size
    )
    if not lines:
        click.echo(f"all of {count(len(files))} log(s) are empty" if files else "no logs: nothing has run yet")
        return
    columns = heading("log", "of a", "bytes", "written", right=("bytes", "written"))
    show(Layout(title="logs", columns=columns, lines=lines), sys.stdout)


def _show_failed(config: str, overrides: tuple[str, ...], name: str | None, *, as_json: bool) -> None:
    samples = [s for s in api.failed_samples(config, overrides) if name is None or name in (s.model, s.task)]
    if as_json:
        print_json(samples)
        return
    for sample in samples:
        click.echo(f"{shown(sample.model)} {shown(sample.task)} document {sample.doc_id}: {sample.boundary}")
        click.echo(f"  {shown(sample.message)} ({sample.attempts} attempt{'s' * (sample.attempts != 1)})")
        click.echo("\n".join("  | " + shown(line) for line in sample.prompt.splitlines()[-8:]))
    if not samples:
        whose = "" if name is None else f" of a model or task called {shown(name)!r}"
        click.echo(f"no sample{whose} failed for good")
