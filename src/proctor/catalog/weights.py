"""The weights fingerprint: which bytes, read in which numerics, decide a model's answers. Never a path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from proctor.catalog.checkpoints import children, is_weight_file
from proctor.catalog.digests import file_digest, file_digests
from proctor.catalog.gguf import GgufMetadata, read_gguf
from proctor.catalog.models import ModelEntry, ModelKind
from proctor.catalog.tokenizer_files import read_json, stated_max_length, template_digest, tokenizer_digest
from proctor.errors import ModelError
from proctor.records import Json, canonical_json, digest

_VERSION: Final = 1
_CONFIGS: Final = ("config.json", "params.json", "adapter_config.json", "quantize_config.json", "hf_quant_config.json")
_INDEX: Final = ".index.json"
_SPLIT: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_APPLIES_GENERATION_CONFIG: Final = frozenset(
    {"lm_eval:hf", "lm_eval:hf-auto", "lm_eval:huggingface", "lm_eval:hf-multimodal"}
)
"""Engines that let generation_config.json change an answer. HTTP servers are sent every sampling field."""
_LENGTHS: Final = ("n_positions", "max_position_embeddings", "n_ctx")
"""lm-evaluation-harness 0.4.13, resolve_max_length: in this order, a nested text_config before the top level."""
_LENGTH_ALIASES: Final = {
    "dbrx": "max_seq_len",
    "rwkv": "context_length",
    "kimi_linear": "model_max_length",
    "bailing_hybrid": "model_max_length",
}
"""model_type: what transformers reads as its max_position_embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What decides a model's answers, and what its files say about tokens."""

    fingerprint: str
    """64 hexadecimal digits: the digest of `identity`."""
    identity: str
    """Canonical JSON: every file with its SHA-256 (or the endpoint's declared name), and the numerics."""
    tokenizer_digest: str | None
    """None where no tokenizer is known (an endpoint without `tokenizer:`)."""
    template_digest: str | None
    """Of the chat templates; None if there is none."""
    max_length: int | None
    """The model's own window in tokens; None if it does not say."""


def identify(entry: ModelEntry, *, numerics: Mapping[str, Json]) -> Weights:
    """Compute a model's fingerprint, reading every weight file unless its digest is known.

    `numerics` is what the user chose: `engine` (vllm, llama.cpp, lm_eval:hf, ...) and its dtype, quantisation
    and KV-cache dtype (see `config.numerics`). Equal bytes give equal fingerprints wherever they lie; one
    other byte gives another. Raises ModelError for files that are missing, unreadable or damaged.
    """
    identity: dict[str, Json] = {"v": _VERSION, "numerics": dict(numerics)}
    identity |= _content(entry, str(numerics.get("engine", "")))
    if entry.adapters:
        identity["adapters"] = [_directory_files(Path(path)) for path in entry.adapters]
    text = canonical_json(identity)
    tokens, template, length = _tokens(entry)
    return Weights(
        fingerprint=digest(identity),
        identity=text,
        tokenizer_digest=tokens,
        template_digest=template,
        max_length=length,
    )


def _content(entry: ModelEntry, engine: str) -> dict[str, Json]:
    if entry.kind is ModelKind.ENDPOINT:
        return {"endpoint": {"served_model": entry.served_model, "revision": entry.revision}}
    path = Path(entry.path)
    if entry.kind in (ModelKind.GGUF, ModelKind.EMBEDDED):
        parts = gguf_parts(path)
        digests = file_digests(parts)
        return {"gguf": [digests[part] for part in parts]}
    out: dict[str, Json] = {"files": _directory_files(path, code=entry.trust_remote_code)}
    generation = path / "generation_config.json"
    if engine in _APPLIES_GENERATION_CONFIG and generation.is_file():
        out["generation_config"] = file_digest(generation)
    return out


def _directory_files(directory: Path, *, code: bool = False) -> dict[str, str]:
    """Name (relative to the directory) and SHA-256 of everything that decides the logits."""
    present = {p.name: p for p in children(directory)}
    chosen = {name: p for name, p in present.items() if is_weight_file(name) or name in _CONFIGS}
    for name, path in present.items():
        if name.endswith(_INDEX):
            chosen[name] = path
            chosen |= _shards(directory, path)
    if not any(is_weight_file(name) for name in chosen):
        raise ModelError(f"no weights in {str(directory)!r}")
    if code and "auto_map" in (read_json(directory / "config.json") or {}):
        chosen |= {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*.py"))}
    digests = file_digests(chosen.values())
    return {name: digests[path] for name, path in sorted(chosen.items())}


def _shards(directory: Path, index: Path) -> dict[str, Path]:
    """The files that an index names. Raises ModelError if one is not there: the model is incomplete."""
    named = (read_json(index) or {}).get("weight_map")
    files = cast("Mapping[str, object]", named).values() if isinstance(named, Mapping) else ()
    shards = {str(name): directory / str(name) for name in files}
    absent = sorted(name for name, path in shards.items() if not path.is_file())
    # Two formats may lie side by side with one index left over: only an index of which some shards exist counts.
    if absent and len(absent) < len(shards):
        raise ModelError(
            f"{str(directory)!r} is incomplete: {index.name} names {len(absent)} file(s) that are not there, "
            f"first {absent[0]!r}",
            hint="wait until the checkpoint is written, or copy it again",
        )
    return {} if absent else shards


def shards_below(directory: Path) -> list[Path]:
    """Files that the directory's indexes of weights name, wherever they lie. Raises ModelError if one is missing."""
    indexes = [p for p in children(directory) if p.name.endswith(_INDEX)]
    return [path for index in indexes for path in _shards(directory, index).values()]


def gguf_parts(path: Path) -> list[Path]:
    """A GGUF file, or all parts of a split one in order. Raises ModelError if a part is not there."""
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        return [path]
    count = int(split[3])
    parts = [path.with_name(f"{split[1]}-{i:05d}-of-{split[3]}.gguf") for i in range(1, count + 1)]
    absent = [p.name for p in parts if not p.is_file()]
    if absent:
        raise ModelError(f"{str(path)!r} is one of {count} parts, but {absent[0]!r} is not there")
    return parts


def _tokens(entry: ModelEntry) -> tuple[str | None, str | None, int | None]:
    """Tokenizer digest, template digest, window."""
    metadata: GgufMetadata | None = None
    own: Path | None = None
    length: int | None = None
    if entry.kind in (ModelKind.GGUF, ModelKind.EMBEDDED):
        metadata = read_gguf(gguf_parts(Path(entry.path))[0])
        length = metadata.context_length
    elif entry.kind is not ModelKind.ENDPOINT:
        own = Path(entry.path)
    chosen = Path(entry.tokenizer) if entry.tokenizer else own
    if own is not None:
        length = max_length(own, chosen)
    if chosen is not None:
        tokens, template = _tokenizer_of(chosen)
        return tokens, template, length
    if metadata is None:
        return None, None, length
    templates = metadata.chat_templates
    return metadata.tokenizer_digest, digest(templates) if templates else None, length


def _tokenizer_of(path: Path) -> tuple[str | None, str | None]:
    if path.is_dir():
        return tokenizer_digest(path), template_digest(path)
    if path.suffix == ".gguf":
        metadata = read_gguf(path)
        return metadata.tokenizer_digest, digest(metadata.chat_templates) if metadata.chat_templates else None
    return digest({path.name: file_digest(path)}), None


def max_length(directory: Path, tokenizer: Path | None = None) -> int | None:
    """The window that lm-evaluation-harness's HFLM would use, None where it falls back to its default (2048).

    config.json (a nested text_config first), then the tokenizer's model_max_length unless that means none.
    """
    config = read_json(directory / "config.json") or {}
    nested = config.get("text_config")
    config = cast("Mapping[str, Any]", nested) if isinstance(nested, Mapping) and nested else config
    alias = _LENGTH_ALIASES.get(str(config.get("model_type")), "")
    for key in (*_LENGTHS, alias):
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return int(value)
    place = tokenizer or directory
    return stated_max_length(place) if place.is_dir() else None
