"""Our command against lm-eval's own command: the same models and tasks, every printed digit of every metric.

By default the whole of HellaSwag's 100 items and GSM8K's 16 go to a tiny model, and a few documents of every task to
the others; PROCTOR_PARITY_FULL=1 gives all documents to all models.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800), pytest.mark.xdist_group("end_to_end")]

PLAIN = (
    *("e2e_shuffled", "e2e_hellaswag", "e2e_hellaswag_5", "e2e_gsm8k", "e2e_rolling", "e2e_group", "e2e_repeats"),
    *("e2e_long", "e2e_long_text"),
)
CHAT = ("e2e_talk", "e2e_talk_choice")
SYSTEM = "Be brief."
CHAT_KEYS = {"apply_chat_template": True, "system_instruction": SYSTEM}
CHAT_FLAGS = ("--apply_chat_template", "--system_instruction", SYSTEM)
ARGS = {"dtype": "float32"}
FULL = bool(os.environ.get("PROCTOR_PARITY_FULL"))
LIMIT = None if FULL else 6
SOME = ("tiny-bos", "smollm2", *(("smollm2-bos",) if FULL else ()))


def hf_engine(python: str) -> dict[str, Any]:
    return {"type": "lm_eval", "model": "hf", "model_args": ARGS, "python": python}


def limited(*flags: str) -> list[str]:
    return [*flags, *(() if LIMIT is None else ("--limit", str(LIMIT)))]


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our run of every document, on a tiny model."""
    config = commands.write_run(
        tmp_path_factory.mktemp("whole"),
        models={"tiny": {"path": str(commands.models / "tiny")}},
        tasks=[{"lm_eval": list(PLAIN)}],
        engine=hf_engine(commands.python),
    )
    return commands.proctor(config) | {"config": config}


@pytest.fixture(scope="module")
def some(commands, gguf: Path | None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our run of some documents, plain and as chats: lm-eval's class on several models, and llama.cpp."""
    models: dict[str, Any] = {name: {"path": str(commands.models / name)} for name in SOME}
    if gguf is not None:
        # Another type starts from that type's defaults: llama.cpp, for a GGUF file.
        models["gguf"] = {"path": str(gguf), "engine": {"type": "openai"}}
    entries = [{"lm_eval": list(PLAIN)}, {"lm_eval": list(CHAT), **CHAT_KEYS}]
    config = commands.write_run(
        tmp_path_factory.mktemp("some"),
        models=models,
        tasks=[entry | ({} if LIMIT is None else {"limit": LIMIT}) for entry in entries],
        engine=hf_engine(commands.python),
        launch={"type": "local", "max_workers": 2},
    )
    return commands.proctor(config) | {"config": config}


def test_hf_class(commands, parity, whole: dict[str, Any], tmp_path: Path) -> None:
    """HellaSwag with 0 and 5 shots, GSM8K, rolling, a group, repeats, choices shuffled at load time, and documents
    longer than the window of 256."""
    theirs = commands.lm_eval(tmp_path, PLAIN, ARGS | {"pretrained": str(commands.models / "tiny")})
    parity.check(parity.metrics(whole, "tiny"), theirs, exact=True)


@pytest.mark.parametrize("model", SOME)
def test_hf_class_on_other_models(commands, parity, some: dict[str, Any], model: str, tmp_path: Path) -> None:
    """The same with a tokenizer that adds BOS, and with real weights."""
    args = ARGS | {"pretrained": str(commands.models / model)}
    parity.check(parity.metrics(some, model), commands.lm_eval(tmp_path, PLAIN, args, *limited()), exact=True)


@pytest.mark.parametrize("model", SOME)
def test_hf_class_chat(commands, parity, some: dict[str, Any], model: str, tmp_path: Path) -> None:
    """Chat template, system instruction, examples as turns."""
    args = ARGS | {"pretrained": str(commands.models / model)}
    theirs = commands.lm_eval(tmp_path, CHAT, args, *limited(*CHAT_FLAGS))
    parity.check(parity.metrics(some, model, chat=True), theirs, exact=True)
