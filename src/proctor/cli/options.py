"""Options that several verbs share, and how results are printed."""

from __future__ import annotations

from typing import Any

import click
import orjson

config_argument = click.argument("config", type=click.Path(), default="run.yaml")
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override one value of the configuration."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


def print_json(value: Any) -> None:
    """One JSON document on standard output; dataclasses, tuples and paths are expressed."""
    text = orjson.dumps(value, default=_express, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
    click.echo(text.decode())


def _express(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return list(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return str(value)
