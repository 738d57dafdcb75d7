"""A tokenizer whose ids are bytes, as the fake server's own: 256 is BOS, 257 is EOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from proctor.infer.fake_model import BEGIN, END

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_byte_tokenizer(directory: Path, *, add_bos: bool = False, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write tokenizer.json and tokenizer_config.json into `directory` (made if absent), and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    special = [(BEGIN, "<s>"), (END, "</s>")]
    vocabulary = _byte_alphabet() | {text: token for token, text in special}
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] if add_bos else []
    body: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, text in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*template, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BEGIN], "tokens": ["<s>"]}} if add_bos else {},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 2048,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer.json").write_text(json.dumps(body), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, each with the byte itself as its id."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shown = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in shown]
    shown |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return {shown[byte]: byte for byte in range(256)}
