"""RunSpec for others: a JSON Schema for editors, and the resolved file that re-runs a run."""

from __future__ import annotations

import ast
import inspect
from typing import Any, Final, cast

import yaml

from proctor.config import spec as spec_module
from proctor.config.document import FLOAT, INT
from proctor.config.spec import FakeEngine, LmEvalModelEngine, RunSpec, SlurmLaunch

Schema = dict[str, Any]
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_NEEDS_TYPE: Final = ("VllmServer", "SglangServer", "CommandServer", "EndpointServer", "LlamaCppServer")


def json_schema() -> Schema:
    """A JSON Schema (draft 2020-12) of run.yaml, with the documentation of every key, for editors."""
    schema = RunSpec.model_json_schema()
    definitions: dict[str, Schema] = schema["$defs"]
    documentation = _documentation()
    for name, definition in (*definitions.items(), ("RunSpec", schema)):
        for key, text in documentation.get(name, {}).items():
            if key in definition.get("properties", {}):
                definition["properties"][key]["description"] = text
    for name in (*_NEEDS_TYPE, LmEvalModelEngine.__name__, FakeEngine.__name__, SlurmLaunch.__name__):
        definitions[name]["required"] = sorted({*definitions[name].get("required", []), "type"})
    schema["properties"]["extends"] = {
        "title": "Extends",
        "description": "Files that this one is merged over, relative to it; later ones win.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return {"$schema": DIALECT, **schema, "title": "Proctor run"}


def _documentation() -> dict[str, dict[str, str]]:
    """Class, field and the text below the field, as spec.py's source has it; inherited fields included."""
    own: dict[str, dict[str, str]] = {}
    for statement in ast.parse(inspect.getsource(spec_module)).body:
        if not isinstance(statement, ast.ClassDef):
            continue
        texts: dict[str, str] = {}
        for base in statement.bases:
            texts |= own.get(getattr(base, "id", ""), {})
        for field, below in zip(statement.body, statement.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                    texts[field.target.id] = inspect.cleandoc(below.value.value).replace("\n", " ")
        own[statement.name] = texts
    return own


class _Dumper(yaml.SafeDumper):
    """Quotes what our reader, or a YAML 1.1 reader, would take for something other than text."""


for _kind, _pattern in (("int", INT), ("float", FLOAT)):
    cast("Any", _Dumper).add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, list("-+.0123456789"))


def _text(dumper: Any, text: str) -> yaml.ScalarNode:
    # A reader folds these into line feeds unless they are escaped, which only double quotes do.
    style = '"' if any(ch in text for ch in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


def dump_resolved(spec: RunSpec) -> str:
    """The run as one YAML document without `extends:`, every default written out.

    `load_run` of this text gives an equal RunSpec, wherever the file lies, if the paths in `spec` are
    absolute, as `load_run` makes them.
    """
    value = spec.model_dump(mode="json")
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
