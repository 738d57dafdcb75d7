"""The numerics that a user chose: the part of the configuration that changes a model's logits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from proctor.config.engines import ADAPTER_ARGUMENTS, Engine, engine_kind
from proctor.config.spec import CommandServer, EndpointServer, LmEvalModelEngine, OpenAIEngine
from proctor.records import Json

_SERVER_NUMERICS: Final = re.compile(
    r"dtype|quant|cache-type|^ct[kv]d?$|rope|yarn|overrides?(-|$)|override-kv|lora|load-format|model-impl"
    r"|config-format|logits|control-vector|speculative|^draft|^revision$|^model-loader|^tokenizer"
)
"""Options of vllm, sglang and llama.cpp that change logits; the others change speed, limits or what is logged."""
_HARMLESS: Final = frozenset(
    {
        "batch_size",
        "max_batch_size",
        "device",
        "device_map",
        "parallelize",
        "max_memory_per_gpu",
        "max_cpu_memory",
        "offload_folder",
        "tensor_parallel_size",
        "data_parallel_size",
        "pipeline_parallel_size",
        "tp_size",
        "dp_size",
        "gpu_memory_utilization",
        "mem_fraction_static",
        "swap_space",
        "max_num_seqs",
        "max_num_batched_tokens",
        "disable_log_stats",
        "download_dir",
        "low_cpu_mem_usage",
        "use_fast_tokenizer",
        "trust_remote_code",
        *ADAPTER_ARGUMENTS.values(),
    }
)
"""Arguments of lm-eval's model classes that do not change an answer, and those whose files are hashed; any other
one may change it."""


def numerics(engine: Engine) -> dict[str, Json]:
    """`engine` (its kind) and whatever else of the configuration changes logits, spelt in one way.

    For vllm, sglang and llama.cpp: dtype, quantisation, KV-cache dtype, position scaling and their kin. For an
    lm-eval model class: every argument that is not known to be harmless. A `command` server is its whole
    command. An endpoint is what the model declares, so nothing. `auto` and unset are the same; so is false for a
    server, where it leaves an option out.
    """
    out: dict[str, Json] = {"engine": engine_kind(engine)}
    if isinstance(engine, LmEvalModelEngine):
        chosen = {k.replace("-", "_"): v for k, v in engine.model_args.items()}
        return out | _stated({k: v for k, v in chosen.items() if k not in _HARMLESS}, false_is_unset=False)
    if not isinstance(engine, OpenAIEngine) or engine.server is None or isinstance(engine.server, EndpointServer):
        return out
    server = engine.server
    if isinstance(server, CommandServer):
        command = list(server.argv) if server.argv is not None else server.shell
        return out | {"command": command, "args": _stated(server.args)}
    options = {k.lstrip("-").replace("_", "-"): v for k, v in server.args.items()}
    return out | _stated({k: v for k, v in options.items() if _SERVER_NUMERICS.search(k)})


def _stated(options: Mapping[str, Any], *, false_is_unset: bool = True) -> dict[str, Json]:
    unset = (None, False) if false_is_unset else (None,)
    kept = {k: v for k, v in options.items() if v != "auto" and not any(v is u for u in unset)}
    return {k: _plain(kept[k]) for k in sorted(kept)}


def _plain(value: Any) -> Json:
    """dtypes are spelt torch.float32, float32 or float; everything else stays."""
    if isinstance(value, str):
        return value.removeprefix("torch.")
    return value
