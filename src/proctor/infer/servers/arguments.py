"""The `args:` of a server as an argument list, and what they say about parallelism and number format."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from proctor.errors import ConfigError


def argument_list(args: Mapping[str, Any], *, reserved: Collection[str], engine: str) -> list[str]:
    """{dtype: float32} becomes --dtype float32; true a bare flag; false and null nothing.

    A list becomes one flag with several values, an object its JSON text. Underscores in names become dashes.
    Raises ConfigError for an option that we set ourselves.
    """
    out: list[str] = []
    for name, value in args.items():
        flag = name.lstrip("-").replace("_", "-")
        if flag in reserved:
            raise ConfigError(
                f"engine.server.args.{name}: {engine} gets {flag!r} from Proctor",
                hint="remove it; model, name, address and key are set for each replica",
            )
        if value is None or value is False:
            continue
        out.append(f"--{flag}")
        if value is True:
            continue
        if isinstance(value, list | tuple):
            out.extend(_text(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
        else:
            out.append(_text(value))
    return out


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def find_argument(args: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of `names` (with dashes) that is set, however it is written; else None."""
    plain = {name.lstrip("-").replace("_", "-"): value for name, value in args.items()}
    return next((plain[name] for name in names if plain.get(name) is not None), None)


def describe_parallelism(args: Mapping[str, Any]) -> str:
    """tp, pp, dp and ep as the arguments set them: "tp2", "tp4dp2", "tp8ep"."""
    out = f"tp{find_argument(args, 'tensor-parallel-size', 'tp-size', 'tp') or 1}"
    for short, names in {
        "pp": ("pipeline-parallel-size", "pp-size", "pp"),
        "dp": ("data-parallel-size", "dp-size", "dp"),
    }.items():
        number = find_argument(args, *names)
        if number is not None and int(number) > 1:
            out += f"{short}{number}"
    if find_argument(args, "enable-expert-parallel") is True:
        out += "ep"
    return out
