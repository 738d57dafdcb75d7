"""How many GPUs a model needs: from what its own files say, else from its name."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from proctor.catalog.checkpoints import children, is_weight_file
from proctor.catalog.gguf import read_gguf
from proctor.catalog.models import ModelEntry, ModelKind
from proctor.catalog.tokenizer_files import read_json
from proctor.errors import ConfigError, ModelError

SHARDED_FROM: Final = 30_000_000_000
"""Parameters from which a model is spread over GPUs where nothing is known of their memory (maxent-grpo's rule)."""
USUAL_GPUS: Final = 8
"""GPUs of a node where nothing else is known."""
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)(?:x(\d+(?:\.\d+)?))?([bm])")
_UNITS: Final = {"b": 10**9, "m": 10**6}
_VOCABULARY: Final = 64
"""vLLM pads vocabularies to a multiple of this, so the number of GPUs has to divide it too."""
_FOR_WEIGHTS: Final = 0.75
"""The part of a GPU's memory that weights may take; the rest is for the KV cache and activations."""
_HEADS: Final = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_SPLIT: Final = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_BYTES: Final = {"float64": 8, "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "float8_e4m3fn": 1}
_MAX_HEADER: Final = 100 << 20
"""No safetensors file has a header of more (the format's own limit)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model's files say about its size; None where they do not."""

    parameters: int | None = None
    heads: int | None = None
    weight_bytes: int | None = None
    source: str = "its name"
    """Where `parameters` is from, as the end of a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuChoice:
    """GPUs for one server, and why."""

    gpus: int
    reason: str


def parameter_count(name: str | None) -> int:
    """Parameters by a model's name, -1 if it says none: the largest of its `7b`, `1.5b`, `350m`, `8x22b` (a product).

    maxent-grpo's rule, also where it errs: `foo-4bit` has 4 billion, `30B-A3B` has 30.
    """
    sizes = [
        float(first) * (float(second) if second else 1) * _UNITS[unit]
        for first, second, unit in _SIZE.findall((name or "").lower())
    ]
    return int(max(sizes)) if sizes else -1


def tensor_parallel_gpus(heads: int | None, available: int = USUAL_GPUS) -> int:
    """The most GPUs of `available` whose number divides both `heads` and 64; all of them if heads are not known.

    1 if none are available. maxent-grpo's rule for vLLM.
    """
    if available <= 0:
        return 1
    if heads is None:
        return available
    return next(n for n in range(available, 0, -1) if heads % n == 0 and _VOCABULARY % n == 0)


def published_gpus(parameters: int, heads: int | None, available: int = USUAL_GPUS) -> tuple[int, bool]:
    """GPUs and whether they share one model, exactly as maxent-grpo submits: from 30 billion parameters on all that
    `tensor_parallel_gpus` gives, below that two, each on its own."""
    return (tensor_parallel_gpus(heads, available), True) if parameters >= SHARDED_FROM else (2, False)


def gpus_for_model(
    facts: ModelFacts, *, name: str = "", available: int | None = None, gpu_bytes: int | None = None
) -> GpuChoice:
    """GPUs for one server of a model, on a node with `available` of them (None: not known) of `gpu_bytes` memory each.

    With the memory known: the fewest that hold the weights in three quarters of it. Otherwise one below 30 billion
    parameters, and from there on as many as can share the model. A number always divides the attention heads.
    """
    if available == 0:
        return GpuChoice(gpus=0, reason="the nodes have no GPUs")
    most = tensor_parallel_gpus(facts.heads, available or USUAL_GPUS)
    place = f"{available} GPUs of a node" if available else f"{USUAL_GPUS} GPUs that a node usually has"
    split = f"{most} of the {place}" + (f" can share its {facts.heads} attention heads" if facts.heads else "")
    if gpu_bytes and facts.weight_bytes:
        return _by_memory(facts, facts.weight_bytes, gpu_bytes, most, split)
    parameters, source = facts.parameters, facts.source
    if parameters is None:
        parameters, source = parameter_count(name), "its name"
    if parameters < 0:
        return GpuChoice(gpus=1, reason="neither its files nor its name say how large it is; one GPU is tried")
    size = f"{_billions(parameters)} parameters by {source}"
    if parameters < SHARDED_FROM:
        return GpuChoice(gpus=1, reason=f"{size}, below {_billions(SHARDED_FROM)}: one GPU")
    return GpuChoice(gpus=most, reason=f"{size}, {_billions(SHARDED_FROM)} or more; {split}")


def gpus_over_nodes(facts: ModelFacts, nodes: int, *, available: int | None = None) -> GpuChoice:
    """GPUs for one server that is spread over `nodes` nodes with `available` GPUs each (None: not known): the most
    that are as many on each node and can share the model's attention heads. Raises ConfigError if no number does."""
    each = USUAL_GPUS if available is None else available
    heads = facts.heads
    for count in range(each, 0, -1):
        total = count * nodes
        if _VOCABULARY % total == 0 and (heads is None or heads % total == 0):
            shared = f" that can share its {heads} attention heads" if heads else ""
            return GpuChoice(gpus=total, reason=f"{count} on each of {nodes} nodes{shared}")
    raise ConfigError(
        f"no number of GPUs on each of {nodes} nodes, up to {each}, divides {_VOCABULARY}"
        + (f" and the {heads} attention heads of the model" if heads else ""),
        hint="state `gpus` of the server (and its tensor and pipeline parallelism in `args:`), or set "
        "launch.nodes_per_server to 1",
    )


def _by_memory(facts: ModelFacts, weights: int, gpu: int, most: int, split: str) -> GpuChoice:
    size = f"{weights / 2**30:.1f} GiB of weights"
    wanted = weights / (gpu * _FOR_WEIGHTS)
    counts = [n for n in range(1, most + 1) if most % n == 0]
    fitting = next((n for n in counts if n >= wanted), None)
    memory = f"{_FOR_WEIGHTS:.0%} of {gpu / 2**30:.0f} GiB each"
    if fitting is None:
        return GpuChoice(
            gpus=most, reason=f"{size} need {math.ceil(wanted)} GPUs ({memory}); {split}: set nodes_per_server"
        )
    return GpuChoice(gpus=fitting, reason=f"{size} fit into {memory} of {fitting} GPU{'s' * (fitting > 1)}; {split}")


def model_facts(entry: ModelEntry) -> ModelFacts:
    """Read parameters and attention heads from a model's own files: headers only, no tensor.

    Raises ModelError for a file that is damaged. A model without files here has no facts.
    """
    path = Path(entry.path)
    if entry.kind in (ModelKind.GGUF, ModelKind.EMBEDDED):
        return _gguf_facts(path)
    return _directory_facts(path) if path.is_dir() else ModelFacts()


def _gguf_facts(path: Path) -> ModelFacts:
    scalars = read_gguf(path).scalars
    heads = scalars.get(f"{scalars.get('general.architecture')}.attention.head_count")
    count = scalars.get("general.parameter_count")
    label = scalars.get("general.size_label")
    by_label = parameter_count(label) if isinstance(label, str) else -1
    parameters = count if isinstance(count, int) else by_label if by_label > 0 else None
    return ModelFacts(
        parameters=parameters,
        heads=heads if isinstance(heads, int) and heads > 0 else None,
        # The header stands in the first part only; how large the others are is not worth a look.
        weight_bytes=None if _SPLIT.search(path.name) else path.stat().st_size,
        source="the header of its GGUF file",
    )


def _directory_facts(directory: Path) -> ModelFacts:
    config = read_json(directory / "config.json") or {}
    files = [p for p in children(directory) if is_weight_file(p.name)]
    tensors = [p for p in files if p.suffix == ".safetensors"]
    heads = _heads(config)
    if tensors:
        count = sum(math.prod(shape) for path in tensors for shape in _shapes(path))
        total = sum(p.stat().st_size for p in tensors)
        # Weights packed into whole numbers hide how many they were; the name knows.
        packed = "quantization_config" in config
        return ModelFacts(
            parameters=None if packed else count,
            heads=heads,
            weight_bytes=total,
            source="the headers of its weights",
        )
    total = sum(p.stat().st_size for p in files)
    width = _BYTES.get(str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch."))
    return ModelFacts(
        parameters=total // width if total and width else None,
        heads=heads,
        weight_bytes=total or None,
        source="the size of its weights",
    )


def _heads(config: Mapping[str, Any]) -> int | None:
    nested = config.get("text_config")
    for place in (nested, config):
        for key in _HEADS:
            value = cast("Mapping[str, Any]", place).get(key) if isinstance(place, Mapping) else None
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _shapes(path: Path) -> Iterator[list[int]]:
    """Of every tensor of a safetensors file. Raises ModelError if it is none or is cut short."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
            yield from (value["shape"] for name, value in header.items() if name != "__metadata__")
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the header of {str(path)!r} is damaged or cut short: {error}") from error


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} billion"
