"""The same generated documents as a task of Proctor, of lm-eval and of Inspect: short prompts, exact answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from bench.load import WORDS
from bench.mock_server import TEXT

MAX_TOKENS: Final = 16
STOP: Final = "\n\n"

NATIVE: Final = """\
task: bench
dataset: {path: documents.jsonl}
output: generate
prompt: "{{question}}"
target: "{{answer}}"
generation: {max_gen_toks: 16, until: ["\\n\\n"]}
extract: [strip]
metrics: [exact_match]
"""

LM_EVAL: Final = """\
task: bench
dataset_path: json
dataset_kwargs: {data_files: {test: DOCUMENTS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 16, until: ["\\n\\n"], do_sample: false, temperature: 0.0}
filter_list:
  - name: none
    filter: [{function: remove_whitespace}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


def write_documents(directory: Path, count: int) -> Path:
    """`count` documents, a native task file and an lm-eval task file beside them; the directory is made."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "documents.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            # Every other answer is what the mock says, so that a wrong score shows.
            answer = TEXT.strip() if number % 2 == 0 else "something else"
            row = {"question": f"Question {number}. {WORDS}Answer:", "answer": answer}
            file.write(json.dumps(row) + "\n")
    (directory / "bench-native.yaml").write_text(NATIVE, encoding="utf-8")
    (directory / "lm-eval").mkdir(exist_ok=True)
    (directory / "lm-eval" / "bench.yaml").write_text(LM_EVAL.replace("DOCUMENTS", str(path)), encoding="utf-8")
    return path


def expected_score(count: int) -> float:
    """The exact match that a right run prints."""
    return ((count + 1) // 2) / count
