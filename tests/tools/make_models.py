"""Make the models that the parity tests need, from the embedded GGUF: run with the harness's interpreter.

smollm2/      SmolLM2-135M-Instruct as float32 safetensors (dequantised), loadable by transformers and vLLM
smollm2-bos/  the same weights with a tokenizer that adds a beginning-of-sequence token
tiny/         a two-layer random Llama with the first 4,096 tokens of that vocabulary (logits of all 49,152 would take
              most of a test's time), window 256: long documents overflow it
tiny-bos/     the same with the BOS-adding tokenizer
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

TINY_VOCABULARY = 4096
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    normalise(out)


def normalise(out: Path) -> None:
    """Write the configuration so that older transformers and vLLM read it too."""
    path = out / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    config.pop("_model_name_or_path", None)
    config["torch_dtype"] = config.get("dtype", "float32")
    path.write_text(json.dumps(config, indent=2))
    path = out / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        tokenizer.pop(key, None)
    tokenizer["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(tokenizer, indent=2))


def make_tiny(source: Path, out: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    copy_tokenizer(source, out)
    cut_vocabulary(out, TINY_VOCABULARY)


def copy_tokenizer(source: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, out / name)


def cut_vocabulary(out: Path, size: int) -> None:
    """Keep the first tokens and what merges into them: ids go in the order in which the tokenizer learnt its merges."""
    path = out / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    model = tokenizer["model"]
    model["vocab"] = {text: n for text, n in model["vocab"].items() if n < size}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


def add_bos(out: Path) -> None:
    """Make the tokenizer add its BOS token, as Llama's does."""
    path = out / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    bos = "<|im_start|>"
    ids = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    sequence = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*sequence, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": pair,
        "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["add_bos_token"] = True
    path.write_text(json.dumps(config, indent=2))


def with_bos(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        target = out / file.name
        target.unlink(missing_ok=True)
        if file.suffix == ".safetensors":
            os.link(file, target)
        else:
            shutil.copy(file, target)
    add_bos(out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out: Path = options.out
    if not (out / "smollm2" / "config.json").exists():
        convert(options.gguf.resolve(), out / "smollm2")
    make_tiny(out / "smollm2", out / "tiny")
    with_bos(out / "smollm2", out / "smollm2-bos")
    with_bos(out / "tiny", out / "tiny-bos")


if __name__ == "__main__":
    main()
