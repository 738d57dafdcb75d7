"""Answers from slices equal those of the class asked all at once, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proctor.config.spec import LmEvalModelEngine as Spec
from proctor.infer.engine import PhysicalRequest
from proctor.infer.lm_eval_model import LmEvalModelEngine
from proctor.records import Answer, Kind, Message, Request, Response

pytestmark = [pytest.mark.parity, pytest.mark.slow]

PYTHON = os.environ.get("PROCTOR_LM_EVAL_PYTHON")
MODELS = os.environ.get("PROCTOR_TEST_MODELS")
DRIVER = Path(__file__).with_name("lm_eval_class_driver.py")
QUESTIONS = ["The capital of France is", "Two and two make", "  Indented, ünïcødé 模型:", "Long. " * 200]
CHOICES = [" Paris", " four", " a longer choice of several tokens", "\n", "x"]
LENGTH = '{"until":["\\n\\n"],"max_gen_toks":12,"do_sample":false,"temperature":0.0}'
SHORT = '{"until":[" the"],"max_gen_toks":5,"do_sample":false}'


def requests() -> list[Request]:
    out = [Request(kind=Kind.LOGLIKELIHOOD, text=q, continuation=c) for q in QUESTIONS for c in CHOICES]
    out += [Request(kind=Kind.ROLLING, text=q) for q in (*QUESTIONS, "word " * 700)]
    out += [Request(kind=Kind.GENERATE, text=q, arguments=a) for a in (LENGTH, SHORT) for q in QUESTIONS]
    turns = (Message(role="system", content="Be brief."), Message(role="user", content="Say hi."))
    out += [Request(kind=Kind.GENERATE, messages=turns, arguments=LENGTH)]
    prefix = (*turns, Message(role="assistant", content="Hi, I"))
    out += [Request(kind=Kind.GENERATE, messages=prefix, add_generation_prompt=False, arguments=LENGTH)]
    out += [Request(kind=Kind.LOGLIKELIHOOD, messages=turns, continuation=c) for c in CHOICES]
    return out


async def feed(asked: list[PhysicalRequest]) -> AsyncIterator[PhysicalRequest]:
    for request in asked:
        yield request


def value(answer: Answer) -> object:
    assert isinstance(answer, Response), answer
    if answer.text is not None:
        return answer.text
    return answer.logprob if answer.is_greedy is None else [answer.logprob, answer.is_greedy]


@pytest.mark.parametrize(
    "model_args",
    [{"dtype": "float32", "max_length": 300}, {"dtype": "float32", "add_bos_token": True, "max_length": 256}],
)
async def test_hf_in_slices_equals_hf_at_once(model_args: dict[str, object], tmp_path: Path, monkeypatch) -> None:
    if PYTHON is None or MODELS is None:
        pytest.skip("PROCTOR_LM_EVAL_PYTHON and PROCTOR_TEST_MODELS are not set")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = str(Path(MODELS) / "tiny")
    asked = requests()
    job = {
        "model": "hf",
        "model_args": model_args | {"pretrained": path},
        "requests": [request.to_json() for request in asked],
    }
    done = subprocess.run(
        [PYTHON, str(DRIVER)], input=json.dumps(job), capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.rpartition("@@")[2])

    spec = Spec(model="hf", model_args=model_args, device="cpu", slice_size=7, python=PYTHON)
    async with LmEvalModelEngine(spec, path=path, log=tmp_path / "host.log") as engine:
        assert engine.info.engine == "lm_eval:hf"
        assert engine.info.dtype == "float32"
        physical = [item for item in await engine.resolve(asked) if isinstance(item, PhysicalRequest)]
        answers = {answer.key: answer async for answer in engine.run(feed(physical))}
    ours = [value(answers[request.key]) for request in asked]
    assert ours == theirs
    cut = {request.text[:5] for request in asked if getattr(answers[request.key], "truncated_tokens", 0)}
    assert cut == {"Long."}
