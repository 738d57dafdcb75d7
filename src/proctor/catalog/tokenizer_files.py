"""What decides how text becomes tokens and chats become text, as digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from proctor.catalog.digests import file_digest
from proctor.errors import ModelError
from proctor.records import digest

_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_CONFIG: Final = "tokenizer_config.json"
_SAYS_NOTHING: Final = frozenset(
    {
        "chat_template",
        "name_or_path",
        "model_max_length",
        "transformers_version",
        "processor_class",
        "backend",
        "is_local",
        "local_files_only",
        "_commit_hash",
    }
)
"""Keys of tokenizer_config.json that do not change the token ids of a text."""


def tokenizer_digest(directory: Path) -> str | None:
    """A digest of every tokenizer file and of what tokenizer_config.json says about tokens; None without any.

    Python code counts where the configuration names it (auto_map). Raises ModelError for an unreadable file.
    """
    parts: dict[str, str] = {name: file_digest(directory / name) for name in _FILES if (directory / name).is_file()}
    config = read_json(directory / _CONFIG)
    if config:
        meaning = {k: v for k, v in config.items() if k not in _SAYS_NOTHING}
        parts[_CONFIG] = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode("ascii")).hexdigest()
        if "auto_map" in config:
            parts |= {p.name: file_digest(p) for p in sorted(directory.glob("*.py"))}
    return digest(parts) if parts else None


def template_digest(directory: Path) -> str | None:
    """A digest of the chat templates: chat_template.jinja and further ones, else the tokenizer configuration's."""
    files = [directory / "chat_template.jinja", directory / "chat_template.json"]
    files += sorted(directory.glob("additional_chat_templates/*.jinja"))
    parts: dict[str, Any] = {str(p.relative_to(directory)): file_digest(p) for p in files if p.is_file()}
    if "chat_template.jinja" not in parts:
        stated = (read_json(directory / _CONFIG) or {}).get("chat_template")
        if stated is not None:
            parts[_CONFIG] = stated
    return digest(parts) if parts else None


def stated_max_length(directory: Path) -> int | None:
    """tokenizer_config.json's model_max_length, unless it is the value that means none (1e30)."""
    value = (read_json(directory / _CONFIG) or {}).get("model_max_length")
    if isinstance(value, bool) or not isinstance(value, int | float) or value >= 10**29:
        return None
    return int(value)


def read_json(path: Path) -> Mapping[str, Any] | None:
    """A JSON object from a file; None if there is no such file. Raises ModelError for anything else."""
    try:
        value: object = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{str(path)!r} must hold a JSON object, not {type(value).__name__}")
    return cast("dict[str, Any]", value)
