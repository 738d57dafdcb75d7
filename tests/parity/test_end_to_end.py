"""Our command against lm-eval's own command: the same models and tasks, every printed digit of every metric.

By default the whole of HellaSwag's 100 items and GSM8K's 16 go to a tiny model, and a few documents of every task to
the others; PROCTOR_PARITY_FULL=1 gives all documents to all models.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from proctor.api.context import RunContext
from proctor.api.recording import recorded
from proctor.api.targets import resolve_targets
from proctor.records import Answer, Kind, Request, Response

# A limit for what hangs, far from what a busy machine takes: the first test of a model also makes our run of it.
pytestmark = [pytest.mark.parity, pytest.mark.timeout(14400 if os.environ.get("PROCTOR_PARITY_FULL") else 3600)]

PLAIN = (
    *("e2e_shuffled", "e2e_hellaswag", "e2e_hellaswag_5", "e2e_gsm8k", "e2e_rolling", "e2e_group", "e2e_repeats"),
    *("e2e_long", "e2e_long_text"),
)
CHAT = ("e2e_talk", "e2e_talk_choice")
SYSTEM = "Be brief."
CHAT_KEYS = {"apply_chat_template": True, "system_instruction": SYSTEM}
CHAT_FLAGS = ("--apply_chat_template", "--system_instruction", SYSTEM)
ARGS = {"dtype": "float32"}
FULL = bool(os.environ.get("PROCTOR_PARITY_FULL"))
LIMITS = dict.fromkeys(("tiny-bos", "smollm2", "smollm2-bos")) if FULL else {"tiny-bos": 8, "smollm2": 2}
"""Documents of each task for each model; `tiny` answers them all."""
TOLERANCE = 0.15
"""llama.cpp quantises activations: the mean over requests of the absolute difference of a token's log-probability
from that in float32, in nats. Measured over 54 requests: mean 0.055, median 0.032, largest 0.22."""
TINY = pytest.mark.xdist_group("parity of tiny models")
REAL = pytest.mark.xdist_group("parity of real models")


def models() -> list[Any]:
    return [pytest.param(name, marks=TINY if name.startswith("tiny") else REAL) for name in LIMITS]


def flags(model: str, *more: str) -> list[str]:
    limit = LIMITS[model]
    return [*more, *(() if limit is None else ("--limit", str(limit)))]


def entries(limit: int | None) -> list[dict[str, Any]]:
    """Everything, plain and as chats."""
    found: list[dict[str, Any]] = [{"lm_eval": list(PLAIN)}, {"lm_eval": list(CHAT), **CHAT_KEYS}]
    return found if limit is None else [entry | {"limit": limit} for entry in found]


def hf_engine(python: str) -> dict[str, Any]:
    return {"type": "lm_eval", "model": "hf", "model_args": ARGS, "python": python}


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our run of every document, on a tiny model."""
    config = commands.write_run(
        tmp_path_factory.mktemp("whole"),
        models={"tiny": {"path": str(commands.models / "tiny")}},
        tasks=[{"lm_eval": list(PLAIN)}],
        engine=hf_engine(commands.python),
    )
    return commands.proctor(config) | {"config": config}


Runs = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def some(commands, gguf: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What our run of some documents with this model printed; made when first asked for, one run for each limit."""
    made: dict[str, dict[str, Any]] = {}

    def run(model: str) -> dict[str, Any]:
        if model in made:
            return made[model]
        names = [name for name in LIMITS if name.startswith("tiny") == model.startswith("tiny")]
        chosen: dict[str, Any] = {name: {"path": str(commands.models / name)} for name in names}
        if gguf is not None and "smollm2" in names:
            server = {"type": "llama.cpp", "slots": 2, "threads": None if FULL else 1}
            chosen["gguf"] = {
                "path": str(gguf),
                "engine": {"type": "openai", "server": server, "truncation": "truncate_left"},
            }
        config = commands.write_run(
            tmp_path_factory.mktemp("some"),
            models=chosen,
            tasks=entries(LIMITS[names[0]]),
            engine=hf_engine(commands.python),
            launch={"type": "local", "max_workers": 2},
        )
        outcome = commands.proctor(config) | {"config": config}
        made.update(dict.fromkeys(chosen, outcome))
        return outcome

    return run


@TINY
def test_hf_class(commands, parity, whole: dict[str, Any], tmp_path: Path) -> None:
    """HellaSwag with 0 and 5 shots, GSM8K, rolling, a group, repeats, choices shuffled at load time, and documents
    longer than the window of 256."""
    theirs = commands.lm_eval(tmp_path, PLAIN, ARGS | {"pretrained": str(commands.models / "tiny")})
    parity.check(parity.metrics(whole, "tiny"), theirs, exact=True)


@TINY
def test_shuffled_choices_in_a_used_cache(commands, parity, whole: dict[str, Any], tmp_path: Path) -> None:
    """Where a run with another seed has left its shuffle in the data set cache, lm-eval takes that one over; we ask
    what a fresh cache gives, and so owe nothing."""
    used = {"HF_DATASETS_CACHE": str(tmp_path / "used")}
    dummy = ("--model", "dummy", "--log_samples")
    commands.lm_eval(tmp_path / "other", ["e2e_shuffled"], {}, *dummy, "--seed", "5,5,5,1234", **used)
    commands.lm_eval(tmp_path / "stale", ["e2e_shuffled"], {}, *dummy, **used)
    assert documents(tmp_path / "stale") == documents(tmp_path / "other"), "the used cache hides nothing"
    again = commands.proctor(whole["config"], **used)
    assert again["owed_before"] == 0
    parity.check(parity.metrics(again, "tiny"), parity.metrics(whole, "tiny"), exact=True)


def documents(out: Path) -> list[Any]:
    """What lm-eval asked about."""
    (file,) = out.rglob("samples_*.jsonl")
    return [json.loads(line)["doc"] for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("model", models())
def test_hf_class_on_other_models(commands, parity, some: Runs, model: str, tmp_path: Path) -> None:
    """The same with a tokenizer that adds BOS, and with real weights."""
    args = ARGS | {"pretrained": str(commands.models / model)}
    theirs = commands.lm_eval(tmp_path, PLAIN, args, *flags(model))
    parity.check(parity.metrics(some(model), model), theirs, exact=True)


@pytest.mark.parametrize("model", models())
def test_hf_class_chat(commands, parity, some: Runs, model: str, tmp_path: Path) -> None:
    """Chat template, system instruction, examples as turns."""
    args = ARGS | {"pretrained": str(commands.models / model)}
    theirs = commands.lm_eval(tmp_path, CHAT, args, *flags(model, *CHAT_FLAGS))
    parity.check(parity.metrics(some(model), model, chat=True), theirs, exact=True)


# --- llama.cpp ------------------------------------------------------------------------------------


def stored(config: Path) -> dict[str, dict[str, tuple[Request, int, Answer]]]:
    """Model → key → request, repeat and answer, read from the store as any program can."""
    context = RunContext.open(config)
    store = context.store(create=False)
    instances = [i for r in recorded(context, store).recordings.values() for i in r.instances]
    found: dict[str, dict[str, tuple[Request, int, Answer]]] = {}
    for target in resolve_targets(context, None):
        answers = store.answers(target.weights, target.resolution).read(list(dict.fromkeys(i.key for i in instances)))
        found[target.entry.name] = {i.key: (i.request, i.repeat, answers[i.key]) for i in instances}
    return found


def as_job(answers: Mapping[str, tuple[Request, int, Answer]]) -> list[list[Any]]:
    """For the driver."""
    rows: list[list[Any]] = []
    for request, repeat, answer in answers.values():
        assert isinstance(answer, Response), answer
        turns = [[m.role, m.content] for m in request.messages]
        prompt = [turns, request.add_generation_prompt] if turns else request.text
        second = json.loads(request.arguments) if request.kind is Kind.GENERATE else request.continuation
        given = {
            Kind.GENERATE: answer.text,
            Kind.LOGLIKELIHOOD: [answer.logprob, answer.is_greedy],
            Kind.ROLLING: answer.logprob,
        }[request.kind]
        rows.append([request.kind.value, prompt, second, repeat, given])
    return rows


@REAL
def test_stored_answers_of_llama_cpp_scored_by_lm_eval(
    commands, parity, gguf: Path | None, some: Runs, tmp_path: Path
) -> None:
    """lm-eval's evaluate builds the tasks itself and asks; the answers are those that the store holds."""
    if gguf is None:
        pytest.skip("no GGUF model: set PROCTOR_TEST_GGUF")
    ours, limit = some("gguf"), LIMITS["smollm2"]
    options = {} if limit is None else {"limit": limit}
    job = {
        "include_path": str(commands.tasks),
        "runs": [{"tasks": list(PLAIN), "options": options}, {"tasks": list(CHAT), "options": options | CHAT_KEYS}],
        "answers": as_job(stored(ours["config"])["gguf"]),
    }
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    driver = Path(__file__).with_name("stored_answers_driver.py")
    commands.run([commands.python, str(driver), str(tmp_path / "job.json"), str(tmp_path / "out.json")])
    out = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert out["unused"] == 0
    for chat, results in enumerate(out["results"]):
        parity.check(parity.metrics(ours, "gguf", chat=bool(chat)), parity.of_lm_eval(results), exact=True)


@REAL
def test_llama_cpp_is_near_float32(gguf: Path | None, some: Runs) -> None:
    """The same weights: float32 by lm-eval's class, and as the quantised file by llama.cpp."""
    if gguf is None:
        pytest.skip("no GGUF model: set PROCTOR_TEST_GGUF")
    found = stored(some("gguf")["config"])
    differences: list[float] = []
    for key, (request, _, near) in found["gguf"].items():
        exact = found["smollm2"][key][2]
        if request.kind is Kind.GENERATE:
            continue
        assert isinstance(near, Response) and isinstance(exact, Response)
        assert near.logprob is not None and exact.logprob is not None and near.token_logprobs
        differences.append(abs(near.logprob - exact.logprob) / len(near.token_logprobs))
    print(spread(differences))
    assert statistics.mean(differences) < TOLERANCE


def spread(values: Sequence[float]) -> str:
    mean, median, largest = statistics.mean(values), statistics.median(values), max(values)
    return f"{len(values)} requests: mean {mean:.4f}, median {median:.4f}, largest {largest:.4f} nats a token"
