"""GPUs for a model. The vectors were made by running the published code."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from proctor.catalog.models import ModelEntry, ModelKind
from proctor.catalog.parallelism import (
    ModelFacts,
    gpus_for_model,
    model_facts,
    parameter_count,
    published_gpus,
    tensor_parallel_gpus,
)
from proctor.errors import ModelError

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B", 8_000_000_000),
        ("Qwen/Qwen2.5-Math-1.5B", 1_500_000_000),
        ("mistralai/Mixtral-8x7B-v0.1", 56_000_000_000),
        ("Qwen/Qwen3-30B-A3B", 30_000_000_000),
        ("org/foo-4bit", 4_000_000_000),
        ("org/model-350m", 350_000_000),
        ("org/70b-4bit", 70_000_000_000),
        ("google/gemma-2b-it", 2_000_000_000),
        ("x/8x22b", 176_000_000_000),
        ("org/1.5B-100M", 1_500_000_000),
        ("microsoft/phi-3-mini", -1),
        (None, -1),
        ("", -1),
    ],
)
def test_parameters_by_name(name: str | None, parameters: int) -> None:
    assert parameter_count(name) == parameters


@pytest.mark.parametrize(
    ("heads", "available", "gpus"),
    [
        *((heads, 8, 8) for heads in (8, 16, 24, 32, 40, 48, 56, 64, 96, None)),
        *((heads, 8, 4) for heads in (12, 20, 28, 36)),
        (14, 8, 2),
        (25, 8, 1),
        (40, 6, 4),
        (32, 0, 1),
        (32, 128, 32),
    ],
)
def test_tensor_parallel_gpus(heads: int | None, available: int, gpus: int) -> None:
    assert tensor_parallel_gpus(heads, available) == gpus


def test_the_published_threshold_is_inclusive() -> None:
    assert published_gpus(30_000_000_000, 40) == (8, True)
    assert published_gpus(29_999_999_999, 40) == (2, False)
    assert published_gpus(-1, None) == (2, False)


# --- what its own files say -----------------------------------------------------------------------


def write_weights(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file whose tensors are not there: only its header is ever read."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    header |= {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def entry(path: Path, kind: ModelKind = ModelKind.DIRECTORY) -> ModelEntry:
    return ModelEntry(
        name="m", display_name="m", model_key="m", label="main", step=None, kind=kind, path=str(path), source=str(path)
    )


def test_parameters_are_counted_in_the_headers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_attention_heads": 14}, "n_head": 3}))
    write_weights(tmp_path / "model-00001-of-00002.safetensors", {"a": [1_000, 20], "b": [7]})
    write_weights(tmp_path / "model-00002-of-00002.safetensors", {"c": [], "d": [3, 3]})
    facts = model_facts(entry(tmp_path))
    assert (facts.parameters, facts.heads) == (20_017, 14)
    assert facts.source == "the headers of its weights"


def test_packed_weights_do_not_say_how_many_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 64, "quantization_config": {}}))
    write_weights(tmp_path / "model.safetensors", {"a": [10, 10]})
    facts = model_facts(entry(tmp_path))
    assert facts.parameters is None
    assert gpus_for_model(facts, name="org/big-72b-awq", available=4).gpus == 4


def test_other_weights_are_measured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "num_heads": 8}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 2_000)
    facts = model_facts(entry(tmp_path))
    assert (facts.parameters, facts.weight_bytes, facts.heads) == (1_000, 2_000, 8)


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, struct.pack("<Q", 50) + b"{}x", struct.pack("<Q", 2) + b"[]"])
def test_damaged_headers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="damaged or cut short"):
        model_facts(entry(tmp_path))


def gguf(path: Path, pairs: dict[str, str | int]) -> Path:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    body = b"".join(
        text(key) + (struct.pack("<I", 8) + text(v) if isinstance(v, str) else struct.pack("<IQ", 10, v))
        for key, v in pairs.items()
    )
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body)
    return path


def test_gguf_headers(tmp_path: Path) -> None:
    pairs: dict[str, str | int] = {"general.architecture": "llama", "llama.attention.head_count": 40}
    path = gguf(tmp_path / "a.gguf", pairs | {"general.size_label": "8x7B"})
    assert model_facts(entry(path, ModelKind.GGUF)).parameters == 56_000_000_000
    path = gguf(tmp_path / "b.gguf", pairs | {"general.parameter_count": 123})
    facts = model_facts(entry(path, ModelKind.GGUF))
    assert (facts.parameters, facts.heads) == (123, 40)
    assert model_facts(entry(gguf(tmp_path / "c.gguf", pairs), ModelKind.GGUF)).parameters is None


# --- the answer and its reason ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "name", "gpus", "reason"),
    [
        (ModelFacts(parameters=8 * 10**9, heads=32, source="the headers of its weights"), "x-70b", 1, "8 billion"),
        (ModelFacts(parameters=30 * 10**9, heads=40, source="x"), "", 4, "4 of the 4 GPUs of a node can share its 40"),
        (ModelFacts(parameters=70 * 10**9, heads=28, source="x"), "", 4, "28 attention heads"),
        (ModelFacts(), "org/llama-70b", 4, "70 billion parameters by its name"),
        (ModelFacts(), "org/phi-mini", 1, "neither its files nor its name"),
        (ModelFacts(heads=14), "org/llama-70b", 2, "2 of the 4 GPUs"),
    ],
)
def test_gpus_for_a_model(facts: ModelFacts, name: str, gpus: int, reason: str) -> None:
    choice = gpus_for_model(facts, name=name, available=4)
    assert choice.gpus == gpus
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("size", "heads", "gpus"), [(15, 32, 1), (60, 32, 2), (140, 64, 4), (140, 14, 2), (800, 64, 8)]
)
def test_with_the_memory_known_the_fewest_that_hold_the_weights(size: int, heads: int, gpus: int) -> None:
    facts = ModelFacts(parameters=1, heads=heads, weight_bytes=size * GIB)
    choice = gpus_for_model(facts, available=8, gpu_bytes=64 * GIB)
    assert choice.gpus == gpus
    assert ("set nodes_per_server" in choice.reason) == (gpus * 48 < size)


def test_nodes_without_gpus() -> None:
    assert gpus_for_model(ModelFacts(parameters=10**12), available=0).gpus == 0
