"""What a server's /metrics say of its load: vLLM's, SGLang's and llama.cpp's names, in Prometheus' text format."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Final

from proctor.infer.concurrency import ServerWord

RUNNING: Final = ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing")
WAITING: Final = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred")
CACHE: Final = (
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "sglang:token_usage",
    "llamacpp:kv_cache_usage_ratio",
)
"""All are shares of 1, whatever their names say."""
PREEMPTIONS: Final = ("vllm:num_preemptions_total", "vllm:num_preemptions")


def read_metrics(text: bytes) -> ServerWord | None:
    """The server's word, or None if it does not speak of a queue. Of several engines the sum, of caches the fullest."""
    waiting = _values(text, WAITING)
    if not waiting:
        return None
    running, cache, preemptions = _values(text, RUNNING), _values(text, CACHE), _values(text, PREEMPTIONS)
    return ServerWord(
        running=sum(running) if running else None,
        waiting=sum(waiting),
        cache=max(cache) if cache else None,
        preemptions=sum(preemptions),
    )


def _values(text: bytes, names: tuple[str, ...]) -> list[float]:
    """The samples of the first of `names` that has any: a line is `name{labels} value [time]`."""
    for name in names:
        found = [_number(value) for value in _sample(name).findall(text)]
        good = [value for value in found if value is not None]
        if good:
            return good
    return []


@cache
def _sample(name: str) -> re.Pattern[bytes]:
    return re.compile(rb"^" + re.escape(name.encode("ascii")) + rb"(?:\{.*\})?[ \t]+(\S+)", re.MULTILINE)


def _number(value: bytes) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
