"""Documents of any Python type as JSON and back, exactly: what JSON lacks is tagged.

Standard library only; numpy values are recognised without importing numpy.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import importlib
import json
import uuid
from collections.abc import Callable
from typing import Any, Final, cast

TAG: Final = "\x00proctor"
"""Key of a tagged value: {TAG: [kind, content]}."""

_TEXTUAL: Final[dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]]] = {
    "bytes": (bytes, lambda v: base64.b64encode(v).decode(), base64.b64decode),
    "datetime": (datetime.datetime, lambda v: v.isoformat(), datetime.datetime.fromisoformat),
    "date": (datetime.date, lambda v: v.isoformat(), datetime.date.fromisoformat),
    "time": (datetime.time, lambda v: v.isoformat(), datetime.time.fromisoformat),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "uuid": (uuid.UUID, str, uuid.UUID),
}
_COLLECTIONS: Final[dict[str, type]] = {"tuple": tuple, "set": set, "frozenset": frozenset}


class Unkept(TypeError):
    """A value that cannot be kept exactly; the message says where it is and what it is."""


def dump(value: Any) -> str:
    """The JSON text of a document. Raises Unkept."""
    return json.dumps(encode(value), ensure_ascii=True, separators=(",", ":"))


def load(text: str) -> Any:
    """The document of a text made by `dump`; a fresh value at every call."""
    return json.loads(text, object_hook=_untag)


def encode(value: Any, where: str = "document") -> Any:
    """`value` in terms of JSON. Types are kept: a tuple does not come back as a list. Raises Unkept."""
    kind = cast("type[Any]", type(value))
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if kind is dict:
        if all(type(key) is str and key != TAG for key in value):
            return {key: encode(item, f"{where}[{key!r}]") for key, item in value.items()}
        return {TAG: ["dict", [[encode(k, where), encode(v, f"{where}[{k!r}]")] for k, v in value.items()]]}
    return {TAG: _tagged(value, where)}


def _tagged(value: Any, where: str) -> list[Any]:
    kind = cast("type[Any]", type(value))
    for name, (cls, to_text, _) in _TEXTUAL.items():
        if kind is cls:
            return [name, to_text(value)]
    for name, cls in _COLLECTIONS.items():
        if kind is cls:
            items = [encode(item, where) for item in value]
            return [name, items if cls is tuple else sorted(items, key=repr)]
    if kind is datetime.timedelta:
        return ["timedelta", [value.days, value.seconds, value.microseconds]]
    if kind is complex:
        return ["complex", [value.real, value.imag]]
    if kind.__module__ == "numpy" and hasattr(value, "dtype") and value.dtype.kind in "biufUS":
        # A float32's Python float and an integer's Python int give the same scalar back.
        name = "numpy.array" if kind.__name__ == "ndarray" else "numpy.scalar"
        return [name, [value.dtype.str, encode(value.tolist(), where)]]
    raise Unkept(f"{where} is a {kind.__module__}.{kind.__qualname__}")


def _untag(value: dict[str, Any]) -> Any:
    if TAG not in value:
        return value
    name, content = value[TAG]
    if name in _TEXTUAL:
        return _TEXTUAL[name][2](content)
    if name in _COLLECTIONS:
        return _COLLECTIONS[name](content)
    if name == "dict":
        return {_key(k): v for k, v in content}
    if name == "timedelta":
        return datetime.timedelta(*content)
    if name == "complex":
        return complex(*content)
    numpy = importlib.import_module("numpy")
    array = numpy.array(content[1], dtype=content[0])
    return array if name == "numpy.array" else array[()]


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
