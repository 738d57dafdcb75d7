"""What `proctor init` writes: an annotated run.yaml and a small task of its own, and the questions it asks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import yaml

from proctor.config.names import name_fault
from proctor.config.numbers import human_int
from proctor.config.spec import is_url

TASK_FILE: Final = "tasks/colours.yaml"
DATA_FILE: Final = "tasks/colours.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of `proctor init --interactive`."""

    key: str
    text: str
    default: str
    check: Callable[[str], str | None]
    """What is wrong with an answer; None if nothing is."""
    asked: Callable[[Mapping[str, str]], bool] = lambda answers: True
    """Whether the answers so far call for this question."""


def _any(answer: str) -> str | None:
    return None if answer.strip() else "must not be empty"


def _limit(answer: str) -> str | None:
    if answer.strip().lower() in ("", "all", "none"):
        return None
    try:
        return None if human_int(answer) > 0 else "must be at least 1, or all"
    except ValueError:
        return "a number of documents, or all"


def _task_names(answer: str) -> str | None:
    return None if _listed(answer) else "name at least one task; several are separated by commas"


def _is_endpoint(answers: Mapping[str, str]) -> bool:
    return is_url(answers.get("model", ""))


QUESTIONS: Final = (
    Question(key="name", text="Name of the run", default="first", check=name_fault),
    Question(
        key="model",
        text="Model: a directory, a GGUF file, a hub id, embedded:smollm2-135m, or the URL of a server",
        default="embedded:smollm2-135m",
        check=_any,
    ),
    Question(
        key="served_model", text="Name of the model that the server serves", default="", check=_any, asked=_is_endpoint
    ),
    Question(
        key="revision",
        text="Its revision (change it whenever the server's weights change)",
        default="1",
        check=_any,
        asked=_is_endpoint,
    ),
    Question(
        key="tasks",
        text=f"Tasks: names of lm-evaluation-harness tasks, files (.yaml), or {TASK_FILE}; separated by commas",
        default=TASK_FILE,
        check=_task_names,
    ),
    Question(key="limit", text="Documents of each task (a number, or all)", default="all", check=_limit),
    Question(key="store", text="Where answers are kept; a team can share one store", default="./store", check=_any),
)
"""In order; ask those whose `asked` holds for the answers so far."""


def default_answers() -> dict[str, str]:
    """What `proctor init` assumes when it does not ask."""
    return {q.key: q.default for q in QUESTIONS if q.asked({})}


def template(answers: Mapping[str, str] | None = None) -> str:
    """The annotated run.yaml for these answers (keys of QUESTIONS; None: the defaults).

    It is valid as it stands. With the defaults it runs once `starter_files` lie next to it.
    """
    given = default_answers() | dict(answers or {})
    return _TEMPLATE.format(
        name=_quoted(given["name"]),
        store=_quoted(given["store"]),
        model=_model(given),
        tasks=_tasks(given),
    )


def starter_files(answers: Mapping[str, str] | None = None) -> dict[str, str]:
    """Every file that `proctor init` writes, by its path relative to run.yaml, run.yaml included.

    The native task is there only if the answers use it.
    """
    files = {"run.yaml": template(answers)}
    given = default_answers() | dict(answers or {})
    if TASK_FILE in _listed(given["tasks"]):
        files[TASK_FILE] = _TASK
        rows = [json.dumps({"thing": t, "colours": c, "answer": c[i]}) for t, c, i in _COLOURS]
        files[DATA_FILE] = "".join(row + "\n" for row in rows)
    return files


def _listed(answer: str) -> list[str]:
    return [part.strip() for part in answer.split(",") if part.strip()]


def _quoted(text: str) -> str:
    """A text as one line of YAML."""
    if re.fullmatch(r"[A-Za-z./][\w./:-]*[\w/]", text) and text.lower() not in _WORDS:
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=2**20).strip()


_WORDS: Final = frozenset({"true", "false", "null", "yes", "no", "on", "off"})


def _model(given: Mapping[str, str]) -> str:
    path = given["model"]
    if path == "embedded:smollm2-135m":
        return "  smollm2: {path: embedded:smollm2-135m}\n"
    name = given.get("served_model", "") if is_url(path) else path.rstrip("/").rsplit("/", 1)[-1]
    lines = [f"  {_quoted(name or 'mine')}:", f"    path: {_quoted(path)}"]
    if is_url(path):
        lines.append(f"    served_model: {_quoted(given.get('served_model', '') or 'default')}")
        lines.append(f"    revision: {_quoted(given.get('revision', '') or '1')}")
    return "\n".join(lines) + "\n"


def _tasks(given: Mapping[str, str]) -> str:
    names = _listed(given["tasks"])
    files = [n for n in names if n.endswith((".yaml", ".yml")) or n.startswith("demo:")]
    limit = given.get("limit", "all").strip().lower()
    stated = "" if limit in ("", "all", "none") else f"    limit: {human_int(limit)}\n"
    harness = [n for n in names if n not in files]
    out = "".join(f"  - native: {_quoted(name)}\n{stated}" for name in files)
    if harness:
        out += f"  - lm_eval: [{', '.join(_quoted(name) for name in harness)}]\n{stated}"
    return out


_TEMPLATE: Final = """\
# A run: which models answer which tasks, on what, and where the answers are kept.
# `proctor validate run.yaml` checks this file, `proctor run run.yaml` runs it.
# Lines that begin with # show what else is possible.

name: {name}
store: {store}          # answers are kept here and never asked for twice; relative to this file
# extends: [base.yaml]   # merge this file over others

models:
{model}\
#   mine:
#     path: /models/mine                 # a directory, a GGUF file, a hub id, or http://host:8000
#     display_name: Mine 1B
#     revision: main                     # hub: branch, tag or commit; endpoint: what you call these weights
#     checkpoints: {{pattern: "checkpoint_{{step}}", steps: [5000, 10000]}}
#     train_batch_size: 2_097_152        # tokens for each step; or tokens_trained: 100B
#     engine: {{server: {{args: {{max-model-len: 4096}}}}}}   # over the engine below, for this model

tasks:
{tasks}\
#   - lm_eval: [hellaswag, arc_easy]     # tasks, groups or tags of lm-evaluation-harness; see `proctor tasks`
#     num_fewshot: [0, 5]                # a list is crossed
#     limit: 100                         # a number, a fraction, a slice such as 10:20, or a list of ids
#     apply_chat_template: true

# What asks the models. Left out: a server that suits the model (llama.cpp for GGUF, vllm for directories).
# engine:
#   type: openai                         # or lm_eval: a model class of lm-evaluation-harness, in process
#   server: {{type: vllm, replicas: 1, gpus: 1, args: {{dtype: bfloat16}}}}
#   max_in_flight: 64                    # at each server, at most; how many there are is found

# launch: {{type: local, workers: 1}}
# profile: reproducible                  # float32, one request at a time
"""

_TASK: Final = """\
# A task in Proctor's own format: documents, how each becomes a prompt, and how answers are marked.
task: colours
version: 1
description: The usual colour of a thing, out of four.
dataset: {path: colours.jsonl}
output: multiple_choice
prompt: "The colour of {{thing}} is"
choices: "{{colours}}"
target: "{{answer}}"
target_is: text
metrics: [accuracy, normalised_accuracy]
"""

_COLOURS: Final = (
    ("fresh snow", ("white", "green", "red", "purple"), 0),
    ("ripe tomatoes", ("blue", "red", "grey", "white"), 1),
    ("summer grass", ("black", "pink", "green", "orange"), 2),
    ("coal", ("yellow", "white", "blue", "black"), 3),
    ("a clear sky at noon", ("blue", "brown", "red", "green"), 0),
    ("a ripe banana", ("purple", "yellow", "black", "blue"), 1),
    ("blood", ("green", "white", "red", "grey"), 2),
    ("milk chocolate", ("blue", "pink", "green", "brown"), 3),
    ("an elephant", ("grey", "orange", "green", "purple"), 0),
    ("a carrot", ("blue", "orange", "black", "white"), 1),
    ("a flamingo", ("green", "black", "pink", "blue"), 2),
    ("lavender flowers", ("red", "orange", "brown", "purple"), 3),
)
"""Thing, colours to choose from, position of the right one."""
