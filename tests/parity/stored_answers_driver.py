"""Scores stored answers with lm-eval's own evaluate; started with lm-eval's interpreter, without Proctor.

usage: stored_answers_driver.py JOB.json OUT.json. The job: {"runs": [{"tasks", "options"}], "include_path", "answers":
[[kind, prompt, second, repeat, answer], ...]}. `prompt` is a text, or [messages, add_generation_prompt]; `second` the
continuation or the generation arguments. lm-eval builds the tasks and asks; what it asks is looked up.
"""

import json
import sys
from pathlib import Path

from lm_eval.api.model import LM
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable


def name(kind, prompt, second, repeat):
    return json.dumps([kind, prompt, second, repeat], sort_keys=True)


class Stored(LM):
    tokenizer_name = "stored"

    def __init__(self, answers):
        super().__init__()
        self.answers = {name(*asked): answer for *asked, answer in answers}
        self.used = set()

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return json.dumps([[[m["role"], m["content"]] for m in chat_history], add_generation_prompt])

    def look_up(self, requests):
        seen, out = {}, []
        for request in requests:
            # lm-eval hands a request with repeats over once for each of them.
            repeat = seen[id(request)] = seen.get(id(request), -1) + 1
            prompt = request.args[0]
            if prompt.startswith("[[["):
                prompt = json.loads(prompt)
            second = request.args[1] if len(request.args) > 1 else None
            kind = request.request_type
            key = name(kind, prompt, second, repeat if kind == "generate_until" else 0)
            answer = self.answers[key]
            self.used.add(key)
            out.append(tuple(answer) if isinstance(answer, list) else answer)
        return out

    loglikelihood = loglikelihood_rolling = generate_until = look_up


def main(job, out):
    job = json.loads(Path(job).read_text(encoding="utf-8"))
    model, results = Stored(job["answers"]), []
    for run in job["runs"]:
        options = run["options"]
        config = EvaluatorConfig(tasks=run["tasks"], include_path=job["include_path"], **options)._configure()
        manager = TaskManager(include_path=job["include_path"], include_defaults=False)
        found = simple_evaluate(
            model=model,
            tasks=run["tasks"],
            task_manager=manager,
            limit=config.limit,
            system_instruction=config.system_instruction,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            log_samples=False,
        )
        results.append(json.loads(json.dumps(found, default=handle_non_serializable)))
    unused = len(model.answers) - len(model.used)
    Path(out).write_text(json.dumps({"results": results, "unused": unused}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
