"""A model of a known shape with random weights: `random_model.py --shape 1.5b --tokenizer DIR --out DIR`.

Run with an interpreter that has torch and safetensors, such as vLLM's; it imports nothing of ours. Its answers mean
nothing; what a server computes for each token is what it would compute for a real model of that shape.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_STD: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers that decide what a decoder costs."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    bias: bool
    """On queries, keys and values: Qwen2; without: Llama."""


SHAPES: Final = {
    "tiny": Shape(hidden=128, inner=256, layers=2, heads=2, kv_heads=1, bias=False),
    "0.5b": Shape(hidden=896, inner=4864, layers=24, heads=14, kv_heads=2, bias=True),
    "1.5b": Shape(hidden=1536, inner=8960, layers=28, heads=12, kv_heads=2, bias=True),
    "3b": Shape(hidden=2048, inner=11008, layers=36, heads=16, kv_heads=2, bias=True),
    "8b": Shape(hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, bias=False),
}


def config(shape: Shape, vocabulary: int) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["Qwen2ForCausalLM" if shape.bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if shape.bias else "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tensors(shape: Shape, vocabulary: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and sizes, a file's worth at a time: the embeddings, then each layer."""
    head = shape.hidden // shape.heads
    sizes = {"q": shape.heads * head, "k": shape.kv_heads * head, "v": shape.kv_heads * head}
    yield {"model.embed_tokens.weight": (vocabulary, shape.hidden), "model.norm.weight": (shape.hidden,)}
    for number in range(shape.layers):
        layer = f"model.layers.{number}"
        found: dict[str, tuple[int, ...]] = {
            f"{layer}.self_attn.o_proj.weight": (shape.hidden, shape.hidden),
            f"{layer}.mlp.gate_proj.weight": (shape.inner, shape.hidden),
            f"{layer}.mlp.up_proj.weight": (shape.inner, shape.hidden),
            f"{layer}.mlp.down_proj.weight": (shape.hidden, shape.inner),
            f"{layer}.input_layernorm.weight": (shape.hidden,),
            f"{layer}.post_attention_layernorm.weight": (shape.hidden,),
        }
        for name, size in sizes.items():
            found[f"{layer}.self_attn.{name}_proj.weight"] = (size, shape.hidden)
            if shape.bias:
                found[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
        yield found


def write(shape: Shape, tokenizer: Path, out: Path, *, seed: int = 0) -> int:
    """Write the model; how many parameters it has."""
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, out / name)
    words = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*words["model"]["vocab"].values(), *(one["id"] for one in words["added_tokens"])]
    vocabulary = (max(ids) + 64) // 64 * 64
    (out / "config.json").write_text(json.dumps(config(shape, vocabulary), indent=1), encoding="utf-8")
    draw = torch.Generator().manual_seed(seed)
    files = list(tensors(shape, vocabulary))
    places: dict[str, str] = {}
    count = 0
    for number, sizes in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weights = {key: _weights(key, size, draw) for key, size in sizes.items()}
        save_file(weights, out / name, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, name)
        count += sum(one.numel() for one in weights.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return count


def _weights(name: str, size: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    import torch

    if name.endswith("norm.weight"):
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.randn(size, generator=draw, dtype=torch.float32).mul_(_STD).to(torch.bfloat16)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    print(write(SHAPES[told.shape], told.tokenizer, told.out, seed=told.seed))


if __name__ == "__main__":
    main()
