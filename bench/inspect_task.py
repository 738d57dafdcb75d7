"""The generated documents as a task of Inspect: `inspect eval bench/inspect_task.py -T documents=FILE`."""

from __future__ import annotations

from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import exact
from inspect_ai.solver import generate


@task
def bench(documents: str) -> Task:
    return Task(
        dataset=json_dataset(documents, FieldSpec(input="question", target="answer")),
        solver=generate(),
        scorer=exact(),
        config=GenerateConfig(max_tokens=16, temperature=0.0, stop_seqs=["\n\n"]),
    )
