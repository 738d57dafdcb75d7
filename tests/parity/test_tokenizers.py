"""Token ids are those of transformers, for the tokenizers of many families; their vocabularies are small."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from proctor.infer.tokenizer import LocalTokenizer

pytestmark = [pytest.mark.parity, pytest.mark.slow]

PYTHON = os.environ.get("PROCTOR_LM_EVAL_PYTHON")
DRIVER = Path(__file__).with_name("tokenizers_driver.py")

SEEN = [
    "The capital of France is",
    " Paris",
    "Paris",
    "",
    " ",
    "\n",
    "  two leading spaces, three trailing   ",
    "tabs\tand\n\nnewlines\r\n",
    "ünïcødé 模型 🦊👩\u200d👩\u200d👧 \u200b zero width \u00a0nbsp",
    "<s>[INST] Hi [/INST] yes</s><s>[INST] more",
    "<|im_start|>user\nspecial<|im_end|>\n<|im_start|>assistant\n",
    "</s>",
    "a </s>  b<|user|> c<|end|>   d",
    "x<|more|>y",
    "1234567890 3.14159",
    "def f(x):\n    return x  # comment\n",
    "▁already",
    "Q: What?\nA: Yes\n\nQ: Who?\nA:",
]
TEXTS = [*SEEN, "not in the corpus: жук 漢字"]
CORPUS = [text for text in SEEN for _ in range(4)] + ["Paris is the capital of France, and more of it"] * 4
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + LLAMA3.replace("{1,3}", "")
SENTENCE: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PLAIN: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
CHAT: dict[str, Any] = {"eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}
OTHER_ENDS = {"special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}}
END = {"content": "<|end|>", "lstrip": False, "rstrip": True, "normalized": False, "special": True}
USER = END | {"content": "<|user|>", "rstrip": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A directory: a tokenizer.json of one make, and what stands beside it."""

    name: str
    make: Literal["prepended", "without bytes", "metaspace", "gemma", "bytes", "qwen", "llama3"]
    config: dict[str, Any]
    model_type: str = "llama"
    bos: bool = True
    """Whether the file itself adds <s>."""
    files: dict[str, Any] = field(default_factory=dict[str, Any])


LLAMA = SENTENCE | {"tokenizer_class": "LlamaTokenizer"}
FAMILIES = [
    Family(name="llama-2", make="prepended", config=LLAMA | {"legacy": False}),
    Family(name="llama-2 unsaid", make="prepended", config=SENTENCE | {"tokenizer_class": "LlamaTokenizerFast"}),
    Family(name="llama-2 legacy", make="prepended", config=LLAMA | {"legacy": True}),
    Family(name="llama-2 no prefix", make="prepended", config=LLAMA | {"add_prefix_space": False}),
    Family(name="llama-2 metaspace", make="metaspace", config=LLAMA),
    Family(name="llama-2 without bytes", make="without bytes", config=LLAMA),
    Family(name="llama-2 generic", make="prepended", config=SENTENCE | {"tokenizer_class": "PreTrainedTokenizerFast"}),
    Family(
        name="llama-2 added",
        make="prepended",
        config=LLAMA | {"added_tokens_decoder": {"700": END, "701": USER}, "additional_special_tokens": ["<|end|>"]},
    ),
    Family(
        name="llama-2 in config.json",
        make="prepended",
        config=SENTENCE,
        files={"config.json": {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}},
    ),
    Family(name="llama class, bytes", make="llama3", config=PLAIN | {"tokenizer_class": "LlamaTokenizerFast"}),
    Family(name="mistral", make="prepended", config=LLAMA | {"legacy": False}, model_type="mistral"),
    Family(name="phi-3", make="prepended", config=LLAMA | {"add_bos_token": False}, model_type="phi3"),
    Family(name="flags", make="prepended", bos=False, config=LLAMA | {"add_bos_token": True, "add_eos_token": True}),
    Family(name="gemma", make="gemma", config=SENTENCE | {"tokenizer_class": "GemmaTokenizer"}, model_type="gemma2"),
    Family(name="llama-3", make="llama3", config=PLAIN),
    Family(name="qwen2", make="qwen", bos=False, config=CHAT | {"add_bos_token": True}, model_type="qwen2"),
    Family(
        name="gpt-2",
        make="bytes",
        bos=False,
        config=CHAT | {"bos_token": "<s>", "tokenizer_class": "GPT2Tokenizer"},
        model_type="gpt2",
    ),
    Family(name="no class", make="bytes", config={"eos_token": "</s>"}),
    Family(name="another bos", make="bytes", config=PLAIN | {"bos_token": "<|user|>"}),
    Family(
        name="additional",
        make="bytes",
        config=PLAIN | {"additional_special_tokens": ["<|user|>", END | {"__type": "AddedToken"}]},
    ),
    Family(name="extra list", make="bytes", config=PLAIN | {"extra_special_tokens": ["<|user|>"]}),
    Family(name="extra names", make="bytes", config=PLAIN | {"extra_special_tokens": {"user_token": "<|user|>"}}),
    Family(name="a name", make="bytes", config=PLAIN | {"user_token": "<|user|>"}),
    Family(
        name="special tokens map",
        make="bytes",
        config={"tokenizer_class": "PreTrainedTokenizerFast"},
        files={"special_tokens_map.json": {"bos_token": "<s>", "additional_special_tokens": ["<|user|>", "<|end|>"]}},
    ),
    Family(
        name="added tokens", make="bytes", config=PLAIN, files={"added_tokens.json": {"<|user|>": 701, "<|end|>": 700}}
    ),
    Family(name="map before configuration", make="bytes", config=PLAIN, files=OTHER_ENDS),
    Family(name="configuration alone", make="bytes", config=PLAIN | {"added_tokens_decoder": {}}, files=OTHER_ENDS),
    Family(name="split", make="bytes", config=PLAIN | {"split_special_tokens": True}),
]


def sentence(make: str) -> Tokenizer:
    """As converted from SentencePiece, with bytes for what it does not know."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=make != "without bytes"))
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=True)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    body = json.loads(made.to_str())
    body["added_tokens"] = [token for token in body["added_tokens"] if token["content"] in special]
    made = Tokenizer.from_str(json.dumps(body))
    space = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if make == "prepended" else None
    made.pre_tokenizer = None
    if make == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    if make == "gemma":
        made.normalizer = space
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return made


def byte_level(make: str) -> Tokenizer:
    """As GPT-2's, or with another pattern before it."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC() if make == "qwen" else None
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if make != "bytes":
        split = pre_tokenizers.Split(Regex(LLAMA3 if make == "llama3" else QWEN), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return made


def write(family: Family, directory: Path) -> Path:
    made = byte_level(family.make) if family.make in ("bytes", "qwen", "llama3") else sentence(family.make)
    if family.bos:
        begin = made.token_to_id("<s>")
        assert begin is not None
        made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", begin)])  # type: ignore[assignment]
    directory.mkdir()
    made.save(str(directory / "tokenizer.json"))
    files = {"tokenizer_config.json": family.config, "config.json": {"model_type": family.model_type}} | family.files
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


Ids = dict[str, Any]
"""Of all texts without and with special tokens, and of BOS and EOS."""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Ids]]]:
    """Each family's directory, and what transformers makes of it."""
    if PYTHON is None:
        pytest.skip("PROCTOR_LM_EVAL_PYTHON is not set")
    root = tmp_path_factory.mktemp("tokenizers")
    directories = [write(family, root / family.name) for family in FAMILIES]
    job = {"directories": list(map(str, directories)), "texts": TEXTS}
    done = subprocess.run(
        [PYTHON, str(DRIVER)], input=json.dumps(job), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    yield {family.name: (directory, ids) for family, directory, ids in zip(FAMILIES, directories, found, strict=True)}


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_ids_are_those_of_transformers(theirs: dict[str, tuple[Path, Ids]], name: str) -> None:
    directory, expected = theirs[name]
    tokenizer = LocalTokenizer(directory)
    assert tokenizer.special_ids == expected["ends"]
    for special, ids in ((False, expected["plain"]), (True, expected["special"])):
        found = tokenizer.encode_now([(text, special) for text in TEXTS])
        wrong = {text: (one, other) for text, one, other in zip(TEXTS, found, ids, strict=True) if one != other}
        assert not wrong, str(wrong)


def test_the_families_differ(theirs: dict[str, tuple[Path, Ids]]) -> None:
    """What the cases are there for: the same file read in several ways."""
    first, legacy, generic = (theirs[name][1]["plain"] for name in ("llama-2", "llama-2 legacy", "llama-2 generic"))
    assert first != legacy != generic != first
    assert theirs["split"][1]["plain"] != theirs["no class"][1]["plain"]
    assert theirs["map before configuration"][1]["ends"] != theirs["configuration alone"][1]["ends"]
