"""The files of a model that whoever serves it reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from proctor.catalog.checkpoints import children
from proctor.catalog.models import ModelEntry, ModelKind
from proctor.catalog.weights import gguf_parts, shards_below

_NOT_NEEDED: Final = frozenset({".md", ".log", ".lock", ".tmp", ".png", ".jpg"})
_TRAINING: Final = re.compile(r"optimizer|scheduler|rng_state|trainer_state|training_args")
"""How the names of files begin that only training reads."""
_CODE: Final = (".py", ".jinja")
"""What is read in directories below a model's own, besides the parts that its index names."""


def needed_files(entry: ModelEntry) -> Iterator[tuple[str, Path]]:
    """(kind, absolute path) of every file: weights, tokenizer, adapter; nothing for an endpoint.

    Directories below the model's own count as far as something there is read: parts of the weights that an index names,
    Python code and chat templates; not the checkpoints that training has left beside the model. Raises ModelError.
    """
    places = [("tokenizer", entry.tokenizer), *(("adapter", path) for path in entry.adapters)]
    if entry.kind is not ModelKind.ENDPOINT:
        places.insert(0, ("weights", entry.path))
    for kind, place in places:
        if place is None:
            continue
        path = Path(place).absolute()
        if path.is_dir():
            found = {p: kind for p in _of_directory(path)}
        else:
            found = dict.fromkeys(gguf_parts(path) if path.suffix == ".gguf" else [path], kind)
        yield from ((kind, file) for file, kind in found.items())


def _of_directory(directory: Path) -> Iterator[Path]:
    for file in children(directory):
        wanted = not file.name.startswith(".") and file.suffix not in _NOT_NEEDED and not _TRAINING.match(file.name)
        if wanted and file.is_file():
            yield file
    yield from (p for p in shards_below(directory) if p.parent != directory)
    for file in sorted(directory.rglob("*")):
        inside = file.relative_to(directory).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside)
        if len(inside) > 1 and file.suffix in _CODE and not hidden and file.is_file():
            yield file
