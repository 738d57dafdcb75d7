"""Record and replay against lm-eval's own run of the same tasks with the same answers: equal to the last bit.

No model: both sides answer from a hash of what was asked. lm-eval's side (lm_eval_replay/native.py) uses none of
our code and runs each case in a fresh process with a fresh data set cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proctor.catalog.lm_eval.source import LmEvalSource
from proctor.config.spec import LmEvalTask
from proctor.errors import TaskError, UnknownName
from proctor.records import Boundary, Failure, Instance, Kind, Message, Recording, Response, Suite
from proctor.score.lm_eval import LmEvalReplay
from proctor.score.replay import Marks

HERE = Path(__file__).parent / "lm_eval_replay"
TEXTS = ["red", "The answer is 7.", " blue because green", "Answer: 12 #### 3", "A", "(B) yes", "", "no idea\nred"]

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Names and options as we take them, and as lm-eval's command line does."""

    names: tuple[str, ...]
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    both: dict[str, Any] = field(default_factory=dict)
    bootstrap_iters: int = 2000


PLAIN = (
    *("pt_zero", "pt_generate", "pt_prefixed", "pt_prefixed_choice", "pt_rolling", "pt_mutual", "pt_inputs"),
    *("pt_targets", "pt_processed", "pt_partial", "pt_python"),
)
CHAT = {"apply_chat_template": True, "system_instruction": "Be brief."}
CASES: dict[str, Case] = {
    "plain": Case(names=PLAIN),
    "bootstrapped 100,000 times": Case(names=("pt_cloze",), bootstrap_iters=100_000),
    "bootstrapped 500 times": Case(names=("pt_binary",), bootstrap_iters=500),
    "0 shots": Case(names=("pt_choice",), both={"num_fewshot": 0}),
    "5 shots": Case(names=("pt_choice", "pt_zero", "pt_inputs", "pt_cloze"), both={"num_fewshot": 5}),
    "another few-shot seed": Case(
        names=("pt_choice",),
        both={"num_fewshot": 3},
        ours={"fewshot_seed": 7},
        theirs={"seed": [0, 1234, 1234, 7]},
    ),
    "shuffled at load time": Case(names=("pt_shuffled",), both={"num_fewshot": 2}),
    "shuffled, other seeds": Case(
        names=("pt_shuffled",), ours={"seeds": (5, 6, 7)}, theirs={"seed": [5, 6, 7, 1234]}, both={"limit": 9}
    ),
    "groups": Case(names=("pt_outer",)),
    "groups with shots and limit": Case(names=("pt_outer",), both={"num_fewshot": 2, "limit": 7}),
    "tag": Case(names=("pt_tag",), both={"limit": 5}),
    "limit as a fraction": Case(names=("pt_choice", "pt_rolling"), both={"limit": 0.33}),
    "chosen samples": Case(
        names=("pt_choice",),
        ours={"limit": (17, 3, 11), "num_fewshot": 1},
        theirs={"samples": {"pt_choice": [3, 11, 17]}, "num_fewshot": 1},
    ),
    "a slice": Case(
        names=("pt_generate",), ours={"limit": "4:20:5"}, theirs={"samples": {"pt_generate": [4, 9, 14, 19]}}
    ),
    "generation arguments": Case(
        names=("pt_generate", "pt_choice"), both={"gen_kwargs": {"temperature": 0, "do_sample": False, "top_p": 0.5}}
    ),
    "system instruction": Case(names=("pt_generate",), both={"system_instruction": "You are terse."}),
    "chat, turns": Case(
        names=("pt_choice", "pt_generate", "pt_mutual", "pt_prefixed", "pt_prefixed_choice", "pt_inputs", "pt_cloze"),
        both={**CHAT, "num_fewshot": 2},
    ),
    "chat, one turn": Case(
        names=("pt_choice", "pt_generate", "pt_prefixed"),
        both={**CHAT, "num_fewshot": 2, "fewshot_as_multiturn": False},
    ),
    "chat, python task": Case(names=("pt_python",), both={"apply_chat_template": True}),
}


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that has lm-eval."""
    chosen = os.environ.get("PROCTOR_LM_EVAL_PYTHON", sys.executable)
    if subprocess.run([chosen, "-c", "import lm_eval, torch"], capture_output=True, check=False).returncode:
        pytest.skip("no lm-eval: set PROCTOR_LM_EVAL_PYTHON to a Python that has lm-eval 0.4.13 and torch")
    return chosen


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The suite's task files, over data made here."""
    root = tmp_path_factory.mktemp("parity tasks")
    rng = random.Random(3)
    for split, count in (("train", 12), ("test", 24), ("short", 5)):
        lines: list[str] = []
        for n in range(count):
            colours = rng.sample(["red", "deep blue", "green", "ünï"], 3)
            row = {"question": f"Which _ is {split} {n}?", "choices": colours, "gold": rng.randrange(3)}
            lines.append(json.dumps(row))
        (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for file in sorted((HERE / "tasks").iterdir()):
        if file.is_file():
            (root / file.name).write_text(file.read_text(encoding="utf-8").replace("@DATA@", str(root)))
    return str(root)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proctor's cache and Hugging Face's, shared by the tests of this file."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def shared_caches(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCTOR_CACHE", str(caches / "proctor"))
    monkeypatch.setenv("HF_HOME", str(caches / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run_natively(python: str, cases: Mapping[str, Mapping[str, Any]], out: Path, caches: Path) -> dict[str, Any]:
    """lm-eval's own results of each case."""
    described = [{"cache": str(caches / "native" / name), **case, "name": name} for name, case in cases.items()]
    (out / "cases.json").write_text(json.dumps(described))
    env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(caches / "hf"), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [python, str(HERE / "native.py"), str(out / "cases.json"), str(out)], env=env, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return {name: json.loads((out / f"{name}.json").read_text()) for name in cases}


@pytest.fixture(scope="module")
def native(python: str, tasks: str, caches: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case, by lm-eval alone: each top-level name in a process of its own."""
    cases = {
        f"{name} {task}": {
            "tasks": [task],
            "include_path": tasks,
            "options": case.both | case.theirs,
            "bootstrap_iters": case.bootstrap_iters,
        }
        for name, case in CASES.items()
        for task in case.names
    }
    return run_natively(python, cases, tmp_path_factory.mktemp("native"), caches)


def answer(instance: Instance) -> Response:
    """What native.py's model would say to this request."""
    request = instance.request
    context: str = request.text
    if request.messages:
        turns = [[m.role, m.content] for m in request.messages]
        context = json.dumps([turns, request.add_generation_prompt])
    second = json.loads(request.arguments) if request.kind is Kind.GENERATE else request.continuation
    asked = json.dumps([request.kind.value, context, second, request.sample_index], sort_keys=True)
    number = int(hashlib.sha256(asked.encode()).hexdigest()[:12], 16)
    if request.kind is Kind.GENERATE:
        return Response(key=instance.key, physical_key="", text=TEXTS[number % len(TEXTS)])
    logprob = -(number % 999_983) / 7_919
    if request.kind is Kind.LOGLIKELIHOOD:
        return Response(key=instance.key, physical_key="", logprob=logprob, is_greedy=number % 3 == 0)
    return Response(key=instance.key, physical_key="", logprob=logprob * 9)


def answers(recordings: Sequence[Recording]) -> dict[str, Any]:
    return {instance.key: answer(instance) for recording in recordings for instance in recording.instances}


def entry(case: Case, python: str, tasks: str, **more: Any) -> LmEvalTask:
    options: dict[str, Any] = case.both | case.ours | {"bootstrap_iters": case.bootstrap_iters} | more
    return LmEvalTask(lm_eval=case.names, python=python, include_path=(tasks,), **options)


def asked(recording: Recording) -> list[list[Any]]:
    """The recording's requests in the terms of native.py."""
    out: list[list[Any]] = []
    for i in recording.instances:
        r = i.request
        turns = [[m.role, m.content] for m in r.messages]
        context = json.dumps([turns, r.add_generation_prompt]) if r.messages else r.text
        second = json.loads(r.arguments) if r.kind is Kind.GENERATE else r.continuation
        out.append([recording.task, r.kind.value, context, second, i.doc_id, i.index, i.repeat])
    return out


def same(ours: Any, theirs: Any) -> None:
    """Equal, NaN included, to the last bit of every number."""
    assert json.dumps(ours, sort_keys=True, indent=1) == json.dumps(theirs, sort_keys=True, indent=1)


def without_place(configs: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        task: {k: v for k, v in config.items() if k != "metadata"} | {"version": config["metadata"].get("version")}
        for task, config in configs.items()
    }
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(kept)))


@pytest.mark.parametrize("name", CASES)
def test_requests_and_metrics_equal_lm_evals(name: str, native: dict[str, Any], python: str, tasks: str) -> None:
    case = CASES[name]
    suites, recordings = LmEvalSource().record(entry(case, python, tasks))
    marks = LmEvalReplay().mark_all(suites, recordings, answers(recordings))
    known = {recording.fingerprint: recording for recording in recordings}
    by_name = {suite.names[0]: (suite, mark) for suite, mark in zip(suites, marks, strict=True)}
    for task in case.names:
        suite, mark = by_name[task]
        assert isinstance(mark, Marks), mark
        theirs = native[f"{name} {task}"]
        compare(suite, [known[f] for f in suite.recordings], mark, theirs, case.theirs.get("samples", {}))


def compare(
    suite: Suite, recordings: Sequence[Recording], marks: Marks, theirs: Mapping[str, Any], chosen: Mapping[str, Any]
) -> None:
    requests = [row for recording in recordings for row in asked(recording)]
    expected = [
        [task, kind, ctx, second, chosen[task][doc] if task in chosen else doc, idx, n]
        for task, kind, ctx, second, doc, idx, n in theirs["asked"]
    ]
    key = json.dumps
    same(sorted(requests, key=key), sorted(expected, key=key))

    results, raw = theirs["results"], json.loads(marks.raw)
    for part in ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples"):
        same(raw.get(part), results.get(part))
    same(without_place(raw["configs"]), without_place(results["configs"]))

    values = {(v.task, f"{v.metric},{v.filter}"): v for v in marks.values}
    printed = {
        (t, k): v for t, m in results["results"].items() for k, v in m.items() if "," in k and "_stderr," not in k
    }
    assert set(values) == set(printed)
    for (task, metric), value in printed.items():
        ours = values[task, metric]
        stderr = results["results"][task][metric.replace(",", "_stderr,", 1)]
        assert (ours.value, ours.stderr) == (value, None if stderr == "N/A" else stderr)
        assert ours.is_group == (task in results["group_subtasks"])
        assert ours.coverage.complete and ours.n == ours.n_expected

    samples = {(s.task, s.doc_id, s.filter): s for s in marks.samples}
    logged = {(t, row["doc_id"], row["filter"]): row for t, rows in results["samples"].items() for row in rows}
    assert set(samples) == set(logged)
    for where, row in logged.items():
        sample = samples[where]
        assert sample.extracted == tuple(r if isinstance(r, str) else json.dumps(r) for r in row["filtered_resps"])
        assert sample.target == (row["target"] if isinstance(row["target"], str) else json.dumps(row["target"]))
        numbers = {m: float(v) for m, v in sample.metrics if v is not None}
        assert numbers == {m: float(row[m]) for m in row["metrics"] if isinstance(row[m], bool | int | float)}


def test_a_shuffling_task_is_recorded_the_same_whatever_happened_before(
    python: str, tasks: str, caches: Path, native: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(*names: str) -> Recording:
        spec = LmEvalTask(lm_eval=names, python=python, include_path=(tasks,), num_fewshot=2)
        _, recordings = LmEvalSource().record(spec)
        return next(r for r in recordings if r.task == "pt_shuffled")

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "fresh"))
    first = record("pt_shuffled")
    used = record("pt_shuffled")
    beside_others = record("pt_choice", "pt_shuffled", "pt_generate")
    # A cache in which lm-eval itself has frozen the shuffle of another seed.
    frozen = {"tasks": ["pt_shuffled"], "include_path": tasks, "cache": str(tmp_path / "frozen")}
    run_natively(python, {"a": frozen | {"options": {"seed": [99, 1, 1, 1], "num_fewshot": 2}}}, tmp_path, caches)
    again = run_natively(python, {"b": frozen | {"options": {"num_fewshot": 2}}}, tmp_path, caches)["b"]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "frozen"))
    poisoned = record("pt_shuffled")

    fresh = native["shuffled at load time pt_shuffled"]["asked"]
    assert again["asked"] != fresh, "lm-eval no longer reuses a frozen shuffle; this test shows nothing"
    same(sorted(asked(first), key=json.dumps), sorted(fresh, key=json.dumps))
    assert {r.fingerprint for r in (first, used, beside_others, poisoned)} == {first.fingerprint}


def test_marking_needs_no_data(python: str, tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(names=("pt_shuffled", "pt_python", "pt_generate"), both={"limit": 6})
    suites, recordings = LmEvalSource().record(entry(case, python, tasks))
    before = LmEvalReplay().mark_all(suites, recordings, answers(recordings))
    gone = [Path(tasks) / f"{split}.jsonl" for split in ("train", "test")]
    kept = [file.read_bytes() for file in gone]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "empty"))
    try:
        for file in gone:
            file.unlink()
        after = LmEvalReplay().mark_all(suites, recordings, answers(recordings))
    finally:
        for file, content in zip(gone, kept, strict=True):
            file.write_bytes(content)
    assert after == before
    assert not any(isinstance(marks, Exception) for marks in after)


def test_an_unanswered_document_is_left_out_and_an_unanswered_member_empties_its_groups(
    python: str, tasks: str
) -> None:
    case = Case(names=("pt_outer",), both={"limit": 6})
    suites, recordings = LmEvalSource().record(entry(case, python, tasks))
    given = answers(recordings)
    by_task = {recording.task: recording for recording in recordings}
    lost = [i.key for i in by_task["pt_choice"].instances if i.doc_id == 2][:1]
    for key in lost:
        given[key] = Failure(key=key, boundary=Boundary.CONTEXT, message="too long", retryable=False)
    for instance in by_task["pt_unequal"].instances:
        del given[instance.key]
    marks = LmEvalReplay().mark(suites[0], recordings, given)
    values = {(v.task, v.metric): v for v in marks.values}

    choice = values["pt_choice", "acc"]
    assert (choice.n, choice.n_expected, choice.coverage.failures) == (5, 6, (("context_length", 1),))
    rows = [dict(s.metrics)["acc"] for s in marks.samples if s.task == "pt_choice" and s.filter == "none"]
    assert len(rows) == 5 and choice.value == sum(v for v in rows if v is not None) / 5
    assert values["pt_unequal", "acc"].value is None and values["pt_unequal", "acc"].n == 0
    outer = values["pt_outer", "acc"]
    assert outer.value is None and outer.missing_members == ("pt_unequal",)
    inner = values["pt_inner", "acc"]
    assert inner.value is not None and inner.missing_members == ()


def test_proof_labels_nothing_for_tasks_that_need_nothing(python: str, tasks: str) -> None:
    case = Case(names=(*PLAIN, "pt_shuffled", "pt_outer"), both={"limit": 4})
    suites, recordings = LmEvalSource().record(entry(case, python, tasks))
    proven = LmEvalReplay().prove(suites, recordings)
    assert {recording.task: recording.labels for recording in proven} == {r.task: () for r in recordings}


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (("pt_unsafe",), {}, "pt_unsafe.*runs code"),
        (("pt_pictures",), {}, "pt_pictures.*images"),
        (("pt_no_data",), {}, "pt_no_data.*data cannot be had"),
        (("pt_trimming",), {"apply_chat_template": True}, "pt_trimming.*messages cannot be recovered"),
        (("pt_choice",), {"limit": (3, 24)}, "pt_choice.*24 documents.*beyond"),
        (("pt_choice",), {"limit": "30:"}, "selects nothing"),
        (("pt_choice",), {"fewshot_as_multiturn": True}, "needs apply_chat_template"),
        (("pt_choice",), {"overrides": {"doc_to_text": "{{nonsense"}}, "pt_choice"),
        (("pt_python",), {"repeats": 4}, "pt_python.*ignores.*repeats"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(
    names: tuple[str, ...], options: dict[str, Any], said: str, python: str, tasks: str
) -> None:
    spec = LmEvalTask(lm_eval=names, python=python, include_path=(tasks,), **options)
    with pytest.raises(TaskError, match=f"(?s){said}"):
        LmEvalSource().record(spec)


def test_an_unknown_name_names_the_nearest(python: str, tasks: str) -> None:
    with pytest.raises(UnknownName, match="pt_choice"):
        LmEvalSource().record(LmEvalTask(lm_eval=("pt_choise",), python=python, include_path=(tasks,)))


def test_names_are_listed_with_their_members(python: str, tasks: str) -> None:
    source = LmEvalSource(python)
    listed = {info.name: info for info in source.list(include=[tasks])}
    assert len(listed) > 10_000
    assert listed["pt_outer"].members == ("pt_inner", "pt_zero", "pt_unequal", "inline")
    assert (listed["pt_tag"].kind, listed["pt_tag"].members) == ("tag", ("pt_choice", "pt_targets"))
    assert {info.name for info in source.search("mmlu_*", include=[tasks])} > {"mmlu_anatomy", "mmlu_stem"}


def test_repeats_and_overrides_reach_the_task(python: str, tasks: str) -> None:
    spec = LmEvalTask(
        lm_eval=("pt_prefixed",),
        python=python,
        include_path=(tasks,),
        limit=2,
        repeats=4,
        replicate=9,
        overrides={"gen_prefix": "Hm:"},
        apply_chat_template="tools",
    )
    _, (recording,) = LmEvalSource().record(spec)
    first = recording.instances[:4]
    assert [(i.repeat, i.request.sample_index, i.request.replicate) for i in first] == [(n, n, 9) for n in range(4)]
    assert len({i.key for i in recording.instances}) == 8
    request = first[0].request
    assert request.messages[-1] == Message(role="assistant", content="Hm:")
    assert not request.add_generation_prompt
    assert json.loads(request.template_arguments) == {"chat_template": "tools"}
