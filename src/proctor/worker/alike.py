"""Whether two checkpoints differ in nothing but the numbers in their weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from proctor.catalog.checkpoints import children, is_weight_file
from proctor.errors import ModelError

_HEADER_MOST: Final = 100 << 20
_UNREAD: Final = ("optimizer", "scheduler", "rng_state", "trainer_state", "training_args", "README", "LICENSE", ".")
"""How the names of files begin that no server reads."""
_UNFIT: Final = ("lora", "speculative", "quantization", "load_format", "kv_transfer", "model_loader")
"""Parts of the names of options under which a server holds more than the weights of the model."""


def unlike(one: str, other: str, args: Mapping[str, Any]) -> str | None:
    """Why a server of the directory `one`, started with `args`, cannot get the weights of `other`; None: it could.

    Everything that a server reads must be equal but the weights themselves: same tensors, same shapes, same types.
    Blocks; never raises.
    """
    for name in args:
        if any(part in name.replace("-", "_") for part in _UNFIT):
            return f"it runs with {name!r}"
    try:
        first, second = (_Directory.read(Path(p)) for p in (one, other))
    except (OSError, ValueError, ModelError, struct.error) as error:
        return f"a checkpoint cannot be compared: {error}"
    names = sorted(first.files.keys() | second.files.keys())
    for name in names:
        if first.files.get(name) != second.files.get(name):
            return f"{name!r} differs"
    if first.tensors != second.tensors:
        return "their tensors differ in names, shapes or types"
    return first.unfit()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Directory:
    files: Mapping[str, bytes]
    """All that is not weights, by name."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @classmethod
    def read(cls, place: Path) -> _Directory:
        files: dict[str, bytes] = {}
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in children(place):
            if path.name.startswith(_UNREAD) or path.name.endswith(".index.json") or not path.is_file():
                continue
            if not is_weight_file(path.name):
                files[path.name] = path.read_bytes()
            elif path.suffix == ".safetensors":
                tensors |= _header(path)
            else:
                raise ValueError(f"{path.name} is no safetensors file")
        if not tensors or "config.json" not in files:
            raise ValueError(f"{str(place)!r} has no safetensors files, or no config.json")
        return cls(files=files, tensors=tensors)

    def unfit(self) -> str | None:
        """Why vLLM would decide by the contents of the weights what it builds."""
        config = cast("dict[str, Any]", json.loads(self.files["config.json"]))
        nested = config.get("text_config")
        levels = [config, *([cast("dict[str, Any]", nested)] if isinstance(nested, dict) else [])]
        if any("quantization_config" in level for level in levels):
            return "the weights are quantised"
        heads = [name for name in self.tensors if name.endswith("lm_head.weight")]
        if heads and any(level.get("tie_word_embeddings") for level in levels):
            return "it has an output head although its embeddings are tied"
        return None


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a safetensors file: eight bytes of length, little-endian, then JSON."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _HEADER_MOST:
            raise ValueError(f"{path.name} is no safetensors file")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: (one["dtype"], tuple(one["shape"])) for name, one in header.items()}
