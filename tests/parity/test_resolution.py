"""What we ask is what lm-eval's own classes ask: ids, windows, lengths, stops and sampling, request by request."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from proctor.config.spec import OpenAIEngine as Spec
from proctor.infer.client import Client
from proctor.infer.engine import PhysicalRequest
from proctor.infer.resolve import Resolver
from proctor.records import Failure, Kind, Message, Request, canonical_json

pytestmark = [pytest.mark.parity, pytest.mark.slow]

PYTHON = os.environ.get("PROCTOR_LM_EVAL_PYTHON")
MODELS = os.environ.get("PROCTOR_TEST_MODELS")
DRIVER = Path(__file__).with_name("resolution_driver.py")

TEXTS = [
    "The capital of France is",
    "  two leading spaces, three trailing   ",
    "tabs\tand\n\nnewlines\r\n",
    "ünïcødé 模型 🦊👩‍👩‍👧 e\u0301 \u200b zero width",
    "<|im_start|>user\nspecial tokens in text<|im_end|>",
    "<|im_end|>",
    "<s>not special here</s> [INST] x [/INST]",
    "1234567890 3.14159 1e-9 0x7f",
    "def f(x):\n    return x  # comment\n",
    "a" * 300 + " " + "лево " * 60,
    "long " * 900,
    "nul\x00byte and \ufffd",
]

CONTINUATIONS = [" Paris", "Paris", "", " ", "\n\nnew", "<|im_end|>", "é", " " + "word " * 40]

ARGUMENTS: list[dict[str, Any]] = [
    {"until": ["\n\n"]},
    {"until": "\n", "do_sample": False, "temperature": 1.0},
    {"until": ["a", "b"], "max_gen_toks": 32, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
    {"until": [], "max_tokens": 17, "temperature": 0.0},
    {"until": ["x"], "max_new_tokens": 12, "do_sample": False},
    {"until": ["x"], "max_completion_tokens": 12, "max_gen_toks": 9, "do_sample": False},
    {"until": ["<|im_end|>", "Q:"], "do_sample": False, "repetition_penalty": 1.2},
    {"do_sample": False, "temperature": 0.0, "max_gen_toks": 100},
]
UNSAMPLABLE: dict[str, Any] = {"until": ["\n"], "do_sample": True, "temperature": 0.0}
"""transformers refuses it, behind the point where the driver looks."""

CHATS = [
    [["system", "Be brief."], ["user", "Hi "], ["assistant", " Hello"], ["user", "2+2?"]],
    [["user", "Continue"], ["assistant", "The answer is "]],
    [["user", "Continue"], ["assistant", "The answer is"]],
]


def requests() -> list[Request]:
    out = [Request(kind=Kind.LOGLIKELIHOOD, text=t, continuation=c) for t in ["", " ", *TEXTS] for c in CONTINUATIONS]
    out += [Request(kind=Kind.ROLLING, text=t) for t in ["", *TEXTS]]
    out += [
        Request(kind=Kind.GENERATE, text=t, arguments=canonical_json(a))
        for t in TEXTS[:4]
        for a in [*ARGUMENTS, UNSAMPLABLE]
    ]
    out += [Request(kind=Kind.GENERATE, text=t, arguments=canonical_json(ARGUMENTS[0])) for t in TEXTS]
    for chat in CHATS:
        opened = chat[-1][0] == "user"
        turns = tuple(Message(role=r, content=c) for r, c in chat)
        out.append(
            Request(
                kind=Kind.GENERATE,
                messages=turns,
                add_generation_prompt=opened,
                arguments=canonical_json(ARGUMENTS[0]),
            )
        )
        out.append(Request(kind=Kind.LOGLIKELIHOOD, messages=turns, add_generation_prompt=opened, continuation=" yes"))
    return out


def as_job(request: Request) -> dict[str, Any]:
    job: dict[str, Any] = {"kind": request.kind.value, "text": request.text, "continuation": request.continuation}
    job["arguments"] = json.loads(request.arguments)
    if request.messages:
        job["messages"] = [[m.role, m.content] for m in request.messages]
        job["add_generation_prompt"] = request.add_generation_prompt
    return job


def adding_bos(source: Path, out: Path) -> Path:
    """The same model with a tokenizer that puts BOS first."""
    shutil.copytree(source, out)
    body = json.loads((out / "tokenizer.json").read_text())
    config = json.loads((out / "tokenizer_config.json").read_text())
    bos = config["bos_token"]
    token = next(t["id"] for t in body["added_tokens"] if t["content"] == bos)
    body["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [token], "tokens": [bos]}},
    }
    config["add_bos_token"] = True
    (out / "tokenizer.json").write_text(json.dumps(body))
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module", params=["plain", "bos"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if PYTHON is None or MODELS is None:
        pytest.skip("PROCTOR_LM_EVAL_PYTHON and PROCTOR_TEST_MODELS are not set")
    plain, out = Path(MODELS) / "tiny", tmp_path_factory.mktemp("models") / f"tiny {request.param}"
    made = adding_bos(plain, out) if request.param == "bos" else Path(shutil.copytree(plain, out))
    # Where the default length of 256 fills the model's own window, vllm's class sends what no vLLM takes.
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return made


def ask_lm_eval(**job: Any) -> list[list[dict[str, Any]]]:
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, str(DRIVER)], input=json.dumps(job), capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("@@")[2])


def check(profile: str, request: Request, ours: PhysicalRequest | Failure, theirs: dict[str, Any]) -> None:
    if isinstance(ours, Failure):
        if profile == "hf" and request.arguments == canonical_json(UNSAMPLABLE):
            return
        assert "error" in theirs, (ours, theirs)
        return
    assert "error" not in theirs, (theirs, ours)
    seen = theirs["seen"]
    if request.kind is not Kind.GENERATE:
        got = [(list(p.token_ids), p.scored) for p in ours.passages if p.scored or profile != "hf"]
        if profile == "hf":
            # hf's class never feeds the last token.
            got = [(ids[:-1], scored) for ids, scored in got]
        assert sorted(got) == sorted((s["ids"], s["scored"]) for s in seen)
        return
    (asked,) = seen
    assert ours.prompt_ids is not None and ours.sampling is not None
    assert list(ours.prompt_ids) == asked["ids"]
    assert ours.sampling.max_tokens == asked["max_tokens"]
    assert list(ours.sampling.stop) == [s for s in asked["stop"] if s]
    fields = asked["sampling"] if profile == "hf" else asked
    if profile == "hf":
        assert (ours.sampling.temperature > 0) == fields["do_sample"]
        if fields["do_sample"]:
            assert ours.sampling.temperature == fields["temperature"]
    else:
        # vLLM's SamplingParams take 1 where no temperature is given.
        assert ours.sampling.temperature == fields.get("temperature", 1.0)
    for name, neutral in (("top_p", 1.0), ("repetition_penalty", 1.0)):
        if ours.sampling.temperature > 0 or name == "repetition_penalty":
            assert getattr(ours.sampling, name) == fields.get(name, neutral)


@pytest.mark.parametrize("profile", ["hf", "vllm", "local-completions"])
async def test_requests_resolve_as_in_lm_eval(model: Path, profile: Any) -> None:
    settings: list[dict[str, Any]] = []
    asked: list[list[Request]] = []
    for add_bos, max_length in itertools.product([None, True, False], [None, 200]):
        # lm-eval sends an arbitrary piece of the prompt, or stops the run, where 256 tokens do not fit into 200.
        fitting = [r for r in requests() if r.kind is not Kind.GENERATE or not max_length or "max_gen" in r.arguments]
        asked.append(fitting)
        settings.append({"max_length": max_length, "add_bos_token": add_bos, "requests": [as_job(r) for r in fitting]})
    theirs = ask_lm_eval(profile=profile, model=str(model), settings=settings)
    for setting, some, others in zip(settings, asked, theirs, strict=True):
        length, bos = setting["max_length"], setting["add_bos_token"]
        spec = Spec(profile=profile, max_length=length, add_bos_token=bos, truncation="truncate_left")
        resolver = Resolver(spec, model, client=Client(lambda: []), model_directory=model)
        for request, one, other in zip(some, await resolver.resolve(some), others, strict=True):
            check(profile, request, one, other)
