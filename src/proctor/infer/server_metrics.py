"""What a server's /metrics say of its load: vLLM's, SGLang's and llama.cpp's names, in Prometheus' text format."""

from __future__ import annotations

import math
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
    text = b"\n" + text
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
        found: list[float] = []
        wanted = b"\n" + name.encode("ascii")
        # A regular expression over all lines takes milliseconds, in which nothing else runs.
        at = text.find(wanted)
        while at >= 0:
            start = at + len(wanted)
            end = text.find(b"\n", start)
            rest = text[start : end if end >= 0 else None]
            value = _number(rest) if rest[:1] in (b"{", b" ", b"\t") else None
            if value is not None:
                found.append(value)
            at = text.find(wanted, start)
        if found:
            return found
    return []


def _number(rest: bytes) -> float | None:
    """The value in what follows a name. Labels end at the last brace."""
    try:
        number = float(rest.rpartition(b"}")[2].split(None, 1)[0])
    except (ValueError, IndexError):
        return None
    return number if math.isfinite(number) else None
