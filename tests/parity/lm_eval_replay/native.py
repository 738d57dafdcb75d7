"""Run lm-eval by itself, with a model that answers from a hash; started with lm-eval's interpreter, without Proctor.

usage: native.py CASES.json OUT_DIRECTORY. A case is {name, tasks, include_path, cache, options}; each runs in a fork
of this process, with a data set cache of its own, through the same steps as lm-eval's command line.
"""

import hashlib
import json
import os
import sys
import traceback
from pathlib import Path

import datasets
import lm_eval.evaluator
from lm_eval.api.model import LM
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

TEXTS = ["red", "The answer is 7.", " blue because green", "Answer: 12 #### 3", "A", "(B) yes", "", "no idea\nred"]


def answer(kind, context, second, sample):
    text = json.dumps([kind, context, second, sample], sort_keys=True)
    number = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
    if kind == "generate_until":
        return TEXTS[number % len(TEXTS)]
    logprob = -(number % 999_983) / 7_919
    return (logprob, number % 3 == 0) if kind == "loglikelihood" else logprob * 9


class Hashing(LM):
    tokenizer_name = "hashing"

    def __init__(self):
        super().__init__()
        self.asked = []

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return json.dumps([[[m["role"], m["content"]] for m in chat_history], add_generation_prompt])

    def _answer(self, requests):
        counts, out = {}, []
        for r in requests:
            n = counts[id(r)] = counts.get(id(r), -1) + 1
            second = r.args[1] if len(r.args) > 1 else None
            self.asked.append([r.task_name, r.request_type, r.args[0], second, r.doc_id, r.idx, n])
            out.append(answer(r.request_type, r.args[0], second, n if r.request_type == "generate_until" else 0))
        return out

    loglikelihood = loglikelihood_rolling = generate_until = _answer


def run(case):
    datasets.config.HF_DATASETS_CACHE = Path(case["cache"])
    options = dict(case["options"])
    config = EvaluatorConfig(tasks=case["tasks"], include_path=case["include_path"], **options)._configure()
    manager = TaskManager(include_path=config.include_path, include_defaults=False, metadata=config.metadata or {})
    model = Hashing()
    results = simple_evaluate(
        model=model,
        tasks=config.tasks,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        samples=config.samples,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        gen_kwargs=config.gen_kwargs,
        task_manager=manager,
        bootstrap_iters=case.get("bootstrap_iters", 100_000),
        random_seed=config.seed[0],
        numpy_random_seed=config.seed[1],
        torch_random_seed=config.seed[2],
        fewshot_random_seed=config.seed[3],
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        metadata=config.metadata,
    )
    return {"results": results, "asked": model.asked}


def main():
    # What they add, the versions of every package, takes seconds and is not compared.
    lm_eval.evaluator.add_env_info = lm_eval.evaluator.get_git_commit_hash = lambda *_: None
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    import torch  # noqa: F401

    running = {}
    while cases or running:
        if cases and len(running) < 2:
            case = cases.pop(0)
            pid = os.fork()
            if pid == 0:
                try:
                    text = json.dumps(run(case), default=handle_non_serializable)
                    (out / f"{case['name']}.json").write_text(text)
                except Exception:  # noqa: BLE001  reported by the exit status
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            running[pid] = case["name"]
            continue
        pid, status = os.wait()
        if pid in running and running.pop(pid) and status:
            sys.exit(1)


if __name__ == "__main__":
    main()
