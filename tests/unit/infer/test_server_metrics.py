"""What is read from /metrics."""

from __future__ import annotations

import pytest

from proctor.infer.concurrency import ServerWord
from proctor.infer.server_metrics import read_metrics

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m, {odd} name"} 12.0
vllm:num_requests_running{engine="1",model_name="m, {odd} name"} 4.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
"""
OLD = 'vllm:num_requests_waiting{model_name="m"} 0.0\nvllm:gpu_cache_usage_perc{model_name="m"} 0.9\n'
SGLANG = (
    'sglang:num_queue_reqs{model_name="m"} 7.0\nsglang:token_usage{model_name="m"} 0.28\nsglang:num_running_reqs 5.0'
)
LLAMA_CPP = "llamacpp:requests_processing 4\nllamacpp:requests_deferred 9\nllamacpp:kv_cache_usage_ratio 0.5\n"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (VLLM, ServerWord(running=16, waiting=3, cache=0.5, preemptions=2)),
        (OLD, ServerWord(running=None, waiting=0, cache=0.9)),
        (SGLANG, ServerWord(running=5, waiting=7, cache=0.28)),
        (LLAMA_CPP, ServerWord(running=4, waiting=9, cache=0.5)),
    ],
    ids=["vllm", "old vllm", "sglang", "llama.cpp"],
)
def test_the_words_of_three_servers(text: str, word: ServerWord) -> None:
    assert read_metrics(text.encode()) == word


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fake_requests_total 3\n",
        "vllm:num_requests_waiting_by_reason 3\n",
        "vllm:num_requests_waiting NaN\n",
        "vllm:num_requests_waiting{\n",
        "x vllm:num_requests_waiting 3\n",
        "<html>",
    ],
)
def test_what_says_nothing_of_a_queue(text: str) -> None:
    assert read_metrics(text.encode()) is None
