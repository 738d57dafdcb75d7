"""Asks an lm-eval model class directly, all at once, as lm-eval's own run does. Runs in lm-eval's environment.

Standard input: {"model", "model_args", "requests": [{kind, text | messages, continuation, arguments}]}.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import defaultdict

os.environ["TOKENIZERS_PARALLELISM"] = "false"
job = json.load(sys.stdin)
printed, sys.stdout = sys.stdout, sys.stderr

import numpy  # noqa: E402
import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

random.seed(0)
numpy.random.seed(1234)
torch.manual_seed(1234)
lm = get_model(job["model"]).create_from_arg_obj(
    job["model_args"], {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
)
asked = defaultdict(list)
for place, request in enumerate(job["requests"]):
    text = request.get("text", "")
    if "messages" in request:
        history = [{"role": role, "content": content} for role, content in request["messages"]]
        text = lm.apply_chat_template(history, add_generation_prompt=request["add_generation_prompt"])
    kind = request["kind"]
    arguments = {
        "loglikelihood": (text, request.get("continuation")),
        "loglikelihood_rolling": (text,),
        "generate_until": (text, json.loads(request.get("arguments", "{}"))),
    }[kind]
    asked[kind].append((place, Instance(request_type=kind, doc={}, arguments=arguments, idx=0)))
answers = [None] * len(job["requests"])
for kind, items in asked.items():
    for (place, _), value in zip(items, getattr(lm, kind)([item for _, item in items]), strict=True):
        answers[place] = value
printed.write("@@" + json.dumps(answers))
