"""Loading and encoding; equality with transformers is shown in tests/parity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proctor.errors import ModelError
from proctor.infer.fake_model import BEGIN, END, decode, encode
from proctor.infer.tokenizer import LocalTokenizer, template_digest, tokenizer_digest
from proctor.testing import write_byte_tokenizer

TRICKY = ["", " ", "plain", "ünïcødé 模型 🦊", "a\x00b", "<s>x</s>", "</s></s>", "< s >", "line\r\n\ttab", "<sx>"]


async def test_the_byte_tokenizer_is_the_fake_models_own(byte_tokenizer: Path) -> None:
    tokenizer = LocalTokenizer(byte_tokenizer)
    ids = await tokenizer.encode([(text, False) for text in TRICKY])
    assert ids == [encode(text) for text in TRICKY]
    assert [decode(i) for i in ids] == [t.replace("<s>", "").replace("</s>", "") for t in TRICKY]
    assert tokenizer.special_ids == {"bos_token": BEGIN, "eos_token": END}


def test_bos_is_added_by_the_file_or_the_caller_whatever_the_configuration_says(tmp_path: Path) -> None:
    plain = write_byte_tokenizer(tmp_path / "plain")
    adding = write_byte_tokenizer(tmp_path / "adding", add_bos=True)
    flagged = write_byte_tokenizer(tmp_path / "flagged")
    config = json.loads((flagged / "tokenizer_config.json").read_text())
    (flagged / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True, "add_eos_token": True}))
    texts = [("x", True), ("x", False)]
    assert LocalTokenizer(plain).encode_now(texts) == [[120], [120]]
    assert LocalTokenizer(adding).encode_now(texts) == [[BEGIN, 120], [120]]
    assert LocalTokenizer(flagged).encode_now(texts) == [[120], [120]]
    assert LocalTokenizer(plain, add_bos_token=True).encode_now(texts) == [[BEGIN, 120], [120]]
    assert LocalTokenizer(adding, add_bos_token=False).encode_now(texts) == [[120], [120]]


def test_truncation_and_padding_of_the_file_are_not_obeyed(byte_tokenizer: Path) -> None:
    path = byte_tokenizer / "tokenizer.json"
    body = json.loads(path.read_text())
    body["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(body))
    assert LocalTokenizer(byte_tokenizer).encode_now([("abcdef", False)]) == [list(b"abcdef")]


TURN = {"content": "<|turn|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}


@pytest.mark.parametrize(
    ("configuration", "files"),
    [
        ({"added_tokens_decoder": {"258": TURN}}, {}),
        ({"additional_special_tokens": ["<|turn|>"]}, {}),
        ({"extra_special_tokens": [TURN]}, {}),
        ({"extra_special_tokens": {"turn_token": "<|turn|>"}}, {}),
        ({"turn_token": "<|turn|>", "add_turn_token": True}, {}),
        ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<|turn|>"]}}),
        ({}, {"added_tokens.json": {"<|turn|>": 258}}),
    ],
)
def test_a_special_token_that_only_the_configuration_names_is_one_token(
    byte_tokenizer: Path, configuration: dict[str, object], files: dict[str, object]
) -> None:
    path = byte_tokenizer / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | configuration))
    for name, content in files.items():
        (byte_tokenizer / name).write_text(json.dumps(content))
    assert LocalTokenizer(byte_tokenizer).encode_now([("a<|turn|>b", False)]) == [[97, 258, 98]]


@pytest.mark.parametrize(
    "configuration",
    [{"added_tokens_decoder": [TURN]}, {"added_tokens_decoder": {"x": TURN}}, {"extra_special_tokens": True}],
)
def test_what_is_no_list_of_tokens_is_named(byte_tokenizer: Path, configuration: dict[str, object]) -> None:
    path = byte_tokenizer / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | configuration))
    with pytest.raises(ModelError, match="cannot read the special and added tokens of"):
        LocalTokenizer(byte_tokenizer)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.model": "x"}, "slow tokenizer"),
        ({"tokenizer.json": "{}"}, "cannot read"),
        ({"tokenizer.json": "not json"}, "cannot read"),
        ({"tokenizer_config.json": "[1]"}, "no JSON object"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=said):
        LocalTokenizer(tmp_path)


def test_digests_follow_content_not_place(tmp_path: Path) -> None:
    one, two = write_byte_tokenizer(tmp_path / "one"), write_byte_tokenizer(tmp_path / "two")
    assert tokenizer_digest(one) == tokenizer_digest(two)
    assert template_digest(one) == template_digest(two)
    (two / "chat_template.jinja").write_text("other")
    assert template_digest(one) != template_digest(two)
    assert tokenizer_digest(one) == tokenizer_digest(two)
    adding = write_byte_tokenizer(tmp_path / "three", add_bos=True)
    assert tokenizer_digest(adding) != tokenizer_digest(one)
    assert tokenizer_digest(None) == "none"
