"""Which keys are valid where: a walk through the schema alongside the data.

Where the schema has a union, the data's discriminating key (`type:`, `lm_eval:`, `native:`) picks the
branch, so that a message never speaks of a branch that the user did not choose.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import BaseModel

from proctor.config.document import Loc
from proctor.config.spec import (
    TASK_SOURCES,
    FakeEngine,
    LmEvalModelEngine,
    LocalLaunch,
    OpenAIEngine,
    RunSpec,
    SlurmLaunch,
)

_UNSTATED: Mapping[frozenset[type[BaseModel]], str] = {
    frozenset({OpenAIEngine, LmEvalModelEngine, FakeEngine}): "openai",
    frozenset({LocalLaunch, SlurmLaunch}): "local",
}
"""Unions whose `type` may be left out, and what it is then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A position in the data and what the schema expects there."""

    loc: Loc
    schema: Any
    """A model class, a generic alias, a union whose branch the data does not decide, or None: anything."""
    branches: tuple[type[BaseModel], ...] = ()
    """The models that could stand here; one, unless the schema has a union."""

    @property
    def fields(self) -> tuple[str, ...] | None:
        """The valid keys; None where any key, or none, is valid."""
        if isinstance(self.schema, type) and issubclass(self.schema, BaseModel):
            return tuple(self.schema.model_fields)
        return None


def place(loc: Sequence[str | int], data: Any, schema: Any = RunSpec, *, tagged: bool = True) -> Place:
    """Follow `loc` through data and schema. If `tagged`, it is pydantic's: each union adds its branch's tag."""
    schema, branches = _decide(schema, data)
    real: list[str | int] = []
    at_union = len(branches) > 1
    for part in loc:
        if tagged and at_union and part in _tags(branches):
            at_union = False
            continue
        schema = _below(schema, part)
        data = _get(data, part)
        real.append(part)
        schema, branches = _decide(schema, data)
        at_union = len(branches) > 1
    return Place(loc=tuple(real), schema=schema, branches=branches)


def fields_at(loc: Loc, data: Any) -> tuple[str, ...] | None:
    """The valid keys of RunSpec at `loc`; None where anything goes or nothing is known."""
    return place(loc, data, tagged=False).fields


def tag_of(model: type[BaseModel]) -> str:
    """What the data says to choose this branch of a union."""
    for key, cls in TASK_SOURCES.items():
        if cls is model:
            return key
    field = model.model_fields.get("type")
    return str(field.default) if field is not None else model.__name__


def _tags(branches: Sequence[type[BaseModel]]) -> list[str]:
    return [tag_of(branch) for branch in branches]


def _get(data: Any, part: str | int) -> Any:
    if isinstance(data, Mapping):
        return cast("Mapping[Any, Any]", data).get(part)
    if isinstance(data, list) and isinstance(part, int) and part < len(cast("list[Any]", data)):
        return cast("list[Any]", data)[part]
    return None


def _unwrapped(schema: Any) -> Any:
    while get_origin(schema) is Annotated:
        schema = get_args(schema)[0]
    return schema


def _alternatives(schema: Any) -> list[Any]:
    schema = _unwrapped(schema)
    if get_origin(schema) in (Union, types.UnionType):
        return [leaf for arg in get_args(schema) if arg is not type(None) for leaf in _alternatives(arg)]
    return [schema]


def _decide(schema: Any, data: Any) -> tuple[Any, tuple[type[BaseModel], ...]]:
    """The one alternative that the data chooses, and all models that could have been chosen."""
    leaves = _alternatives(schema)
    models = tuple(leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, BaseModel))
    if len(leaves) == 1:
        return leaves[0], models
    if not isinstance(data, Mapping) or not models:
        return next((leaf for leaf in leaves if get_origin(leaf) is not None), None), models
    stated = cast("Mapping[str, Any]", data).get("type", _UNSTATED.get(frozenset(models)))
    chosen = [m for m in models if tag_of(m) == stated] or [
        m for m in models if m in TASK_SOURCES.values() and tag_of(m) in data
    ]
    return (chosen[0] if len(chosen) == 1 else None), models


def _below(schema: Any, part: str | int) -> Any:
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        field = schema.model_fields.get(str(part))
        return None if field is None else field.annotation
    origin, args = get_origin(schema), get_args(schema)
    if origin is dict:
        return args[1]
    if origin in (tuple, list) and isinstance(part, int):
        return args[0] if len(args) != 3 or args[-1] is ... else args[min(part, len(args) - 1)]
    return None
