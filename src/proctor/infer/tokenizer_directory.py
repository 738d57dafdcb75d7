"""What stands beside a tokenizer.json, and what transformers 5 makes of it: it does not take the file as it is.

Compared in tests/parity/test_tokenizers.py; `design/engine-habits.md` has what is not imitated.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from proctor.errors import ModelError

SPECIAL_NAMES: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, or an empty object. Raises ModelError if it is malformed."""
    return read_json(directory / "tokenizer_config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file. Raises ModelError if it is unreadable or no object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{str(path)!r} holds no JSON object")
    return cast("dict[str, Any]", value)


def rebuilt_as_llama(directory: Path, config: Mapping[str, Any], loaded: Tokenizer) -> bool:
    """Whether transformers takes a vocabulary and merges from the file, and all else from its class LlamaTokenizer.

    It does for models of that type whose tokenizer is not byte-level; Mistral's and Phi's it takes as they are.
    """
    model = read_json(directory / "config.json")
    name = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "")
    if name.removesuffix("Fast") != "LlamaTokenizer" or (model.get("model_type") or "llama") != "llama":
        return False
    return isinstance(loaded.model, models.BPE) and "ByteLevel" not in f"{loaded.pre_tokenizer}{loaded.decoder}"


def rebuild_as_llama(config: Mapping[str, Any], loaded: Tokenizer) -> None:
    """Llama's pipeline, as the class has it."""
    scheme = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
    loaded.normalizer = None
    loaded.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    loaded.model.fuse_unk, loaded.model.byte_fallback = True, True


def special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text, where the model has them."""
    found = config | _older(directory, config, "special_tokens_map.json")
    return {name: token.content for name in SPECIAL_NAMES if (token := _token(found.get(name))) is not None}


def missing_tokens(
    directory: Path, config: Mapping[str, Any], *, known: Collection[str], named: Iterable[str]
) -> list[AddedToken]:
    """What else is one token, where the file has added those that are `known`, and the special ones are `named`.

    Of these only what the configuration describes in full is said anew: whether it takes the space beside it along, ...
    Raises ModelError for what is no list of tokens.
    """
    try:
        further = _further_tokens(directory, config)
        tokens = _declared_tokens(directory, config, special={token.content for token in further})
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"cannot read the special and added tokens of {str(directory)!r}: {error}") from error

    known = {*known, *(token.content for token in tokens)}
    ends = [AddedToken(text, special=True, normalized=False) for text in named]
    return tokens + [token for token in (*ends, *further) if token.content not in known]


def _declared_tokens(directory: Path, config: Mapping[str, Any], *, special: Collection[str]) -> list[AddedToken]:
    """Tokens with their ids, in the order of these: of the configuration, or else of added_tokens.json."""
    declared = cast("dict[str, object] | None", config.get("added_tokens_decoder"))
    if declared is None:
        older = cast("dict[str, int]", _older(directory, config, "added_tokens.json"))
        return [
            AddedToken(text, special=text in special, normalized=text not in special)
            for text, _ in sorted(older.items(), key=lambda item: item[1])
        ]
    found = [_token(entry) for _, entry in sorted(declared.items(), key=lambda item: int(item[0]))]
    return [token for token in found if token is not None]


def _further_tokens(directory: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    """Special tokens of one model, by a name of their own or in a list."""
    named = [v for k, v in config.items() if k.endswith("_token") and k not in SPECIAL_NAMES]
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    if not listed:
        older = _older(directory, config, "special_tokens_map.json")
        listed = older.get("extra_special_tokens") or older.get("additional_special_tokens")
    values = cast("dict[str, object]", listed).values() if isinstance(listed, dict) else listed or ()
    found = [_token(value) for value in (*named, *cast("Iterable[object]", values))]
    return [token for token in found if token is not None]


def _older(directory: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A file that is read where the configuration lists no tokens with their ids, and then goes before it."""
    return {} if "added_tokens_decoder" in config else read_json(directory / name)


def _token(value: object) -> AddedToken | None:
    """A token as the configuration writes it: its text, or an object; None for anything else, such as a flag."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict):
        return None
    entry = cast("dict[str, Any]", value)
    options = {k: bool(entry[k]) for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in entry}
    return AddedToken(entry["content"], **options) if isinstance(entry.get("content"), str) else None
