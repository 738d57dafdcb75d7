"""Ask lm-eval's own model classes what they would ask a model: run with the harness's interpreter.

Reads JSON {profile, model, settings: [{max_length, add_bos_token, requests}]} from standard input and prints, for each
request of each setting, the token ids and lengths that reached the model (or the server), and the sampling fields.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"


class Asked(Exception):
    """Leaves the class as soon as it asks."""


def instance(request):
    if request["kind"] == "loglikelihood":
        args = (request["text"], request["continuation"])
    elif request["kind"] == "generate_until":
        args = (request["text"], request["arguments"])
    else:
        args = (request["text"],)
    return SimpleNamespace(args=args, task_name="t")


def render(lm, request):
    if "messages" in request:
        turns = [{"role": role, "content": content} for role, content in request["messages"]]
        request["text"] = lm.apply_chat_template(turns, add_generation_prompt=request["add_generation_prompt"])
    return request


def run(lm, request, seen):
    seen.clear()
    request = render(lm, dict(request))
    try:
        getattr(lm, request["kind"])([instance(request)], disable_tqdm=True)
    except Asked:
        pass
    except Exception as error:  # noqa: BLE001 - whatever ends a run of lm-eval is what is compared
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": request["text"], "seen": list(seen)}


def hf(job, seen):
    import torch
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=job["model"], device="cpu", max_length=job["max_length"], add_bos_token=job["add_bos_token"])
    lengths = []

    def call(inputs, *args, **kwargs):
        seen.append({"ids": inputs[0].tolist()})
        return torch.zeros(*inputs.shape, 50_000)

    def select(logits, contlen=None, inplen=None):
        lengths.append(contlen)
        seen[-1]["scored"] = contlen
        return HFLM._select_cont_toks(lm, logits, contlen=contlen, inplen=inplen)

    class Model:
        config = lm.model.config

        def generate(self, input_ids, max_length, stopping_criteria, **kwargs):
            kwargs.pop("attention_mask", None)
            stops = [one.sequence for one in stopping_criteria]
            seen.append(
                {
                    "ids": input_ids[0].tolist(),
                    "max_tokens": max_length - input_ids.shape[1],
                    "stop": stops,
                    "sampling": {k: v for k, v in kwargs.items() if k not in ("pad_token_id", "use_cache")},
                }
            )
            raise Asked

    lm._model_call = call
    lm._select_cont_toks = select
    lm._model = Model()
    return lm


def local_completions(job, seen):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        base_url="http://localhost:1/v1/completions",
        pretrained=job["model"],
        tokenizer_backend="huggingface",
        max_length=job["max_length"] or 2048,
        add_bos_token=bool(job["add_bos_token"]),
    )

    def call(messages, *, generate=True, gen_kwargs=None, **kwargs):
        body = lm._create_payload(
            lm.create_message(messages), generate=generate, gen_kwargs=gen_kwargs, eos=lm.eos_string
        )
        body["ids"] = body.pop("prompt")[0]
        seen.append(body)
        return {"choices": [{"index": 0, "text": ""}]}

    def parse(outputs, tokens=None, ctxlens=None, **kwargs):
        assert ctxlens[0] > 0
        seen[-1]["scored"] = len(tokens[0]) - ctxlens[0]
        return [(0.0, True)]

    lm.model_call = call
    lm.parse_logprobs = parse
    return lm


def pretend_vllm():
    """Enough of vLLM for the class's module to be imported; nothing of it is called."""
    if "vllm" in sys.modules:
        return
    import importlib.metadata
    import types

    real = importlib.metadata.version
    importlib.metadata.version = lambda name: "0.20.0" if name == "vllm" else real(name)
    names = {
        "vllm": ["LLM", "SamplingParams", "TokensPrompt"],
        "vllm.lora": [],
        "vllm.lora.request": ["LoRARequest"],
        "vllm.renderers": [],
        "vllm.renderers.hf": ["resolve_chat_template"],
        "vllm.tokenizers": ["get_tokenizer"],
    }
    for name, members in names.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, None)
        sys.modules[name] = module


def vllm(job, seen):
    pretend_vllm()
    from lm_eval.api.model import CacheHook
    from lm_eval.models import vllm_causallms
    from lm_eval.models.utils import configure_pad_token
    from transformers import AutoConfig, AutoTokenizer

    vllm_causallms.SamplingParams = lambda **kwargs: kwargs
    lm = vllm_causallms.VLLM.__new__(vllm_causallms.VLLM)
    flag = {} if job["add_bos_token"] is None else {"add_bos_token": job["add_bos_token"]}
    lm.tokenizer = configure_pad_token(AutoTokenizer.from_pretrained(job["model"], **flag))
    lm.add_bos_token = job["add_bos_token"]
    lm._max_length = job["max_length"] or AutoConfig.from_pretrained(job["model"]).max_position_embeddings
    lm.custom_prefix_token_id = None
    lm.batch_size, lm._max_gen_toks, lm._rank = 1, 256, 0
    lm.cache_hook = CacheHook(None)
    lm.truncation_side, lm.think_end_token, lm.enable_thinking = "left", None, None
    lm.chat_template_args, lm.hf_chat_template = {}, None

    def generate(requests, generate=False, sampling_params=None):
        seen.append({"ids": requests[0], **((sampling_params or [{}])[0] if generate else {})})
        if generate:
            raise Asked
        return [None]

    def parse(tokens, outputs, ctxlen):
        assert ctxlen > 0
        seen[-1]["scored"] = len(tokens) - ctxlen
        return 0.0, True

    lm._model_generate = generate
    lm._parse_logprobs = parse
    return lm


def main():
    job = json.load(sys.stdin)
    make = {"hf": hf, "vllm": vllm, "local-completions": local_completions}[job["profile"]]
    out = []
    for setting in job["settings"]:
        seen = []
        lm = make(job | setting, seen)
        out.append([run(lm, request, seen) for request in setting["requests"]])
    sys.stdout.write("\n@@" + json.dumps(out))


main()
