"""Marking recordings that are written here by hand, as the native source writes them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from proctor.config.native_task import ExtractStep
from proctor.errors import HarnessError
from proctor.records import Answer, Boundary, Failure, Instance, Kind, Message, Recording, Request, Response, Suite
from proctor.score.native import NativeReplay, extract
from proctor.score.replay import Marks, MetricValue


def recording(
    requests: list[tuple[int, Request]], documents: list[dict[str, Any]], repeats: int = 1, **marking: Any
) -> Recording:
    usual: dict[str, Any] = {"metrics": [], "extract": [], "repeats": repeats, "expects_stop": True}
    instances = [
        Instance(request=r, key=r.key, doc_id=doc, index=i, repeat=r.sample_index)
        for i, (doc, r) in enumerate(requests)
    ]
    return Recording(
        fingerprint="f" * 64,
        source="native",
        source_version="1",
        task="t",
        task_version="1",
        num_fewshot=0,
        settings="{}",
        instances=tuple(instances),
        documents=json.dumps({"marking": usual | marking, "documents": documents}),
    )


def mark(leaf: Recording, answers: list[Answer]) -> Marks:
    suite = Suite(
        id="s", source="native", names=("t",), num_fewshot=None, recordings=(leaf.fingerprint,), settings="{}"
    )
    return NativeReplay().mark(suite, [leaf], {a.key: a for a in answers})


def by_name(marks: Marks) -> dict[tuple[str, str], MetricValue]:
    return {(v.metric, v.filter): v for v in marks.values}


def choosing(*texts: tuple[int, str, str]) -> list[tuple[int, Request]]:
    return [(d, Request(kind=Kind.LOGLIKELIHOOD, text=t, continuation=c)) for d, t, c in texts]


def scored(request: Request, logprob: float, **fields: Any) -> Response:
    return Response(key=request.key, physical_key="p", logprob=logprob, **fields)


def said(request: Request, text: str, **fields: Any) -> Response:
    return Response(key=request.key, physical_key="p", text=text, **fields)


TWO = choosing((0, "sky is", " blue"), (0, "sky is", " green"), (1, "sun is", " red"), (1, "sun is", " yellowish"))
TWO_DOCUMENTS = [
    {"id": 0, "choices": ["blue", "green"], "gold": [0]},
    {"id": 1, "choices": ["red", "yellowish"], "gold": [1]},
]
BOTH = [{"metric": "accuracy"}, {"metric": "normalised_accuracy"}]


def test_multiple_choice() -> None:
    leaf = recording(TWO, TWO_DOCUMENTS, output="multiple_choice", metrics=BOTH)
    marks = mark(leaf, [scored(r, lp) for (_, r), lp in zip(TWO, [-1.0, -2.0, -3.0, -6.0], strict=True)])
    values = by_name(marks)
    # sky: blue wins both ways; sun: red by its sum, yellowish by -6/9 against -3/3.
    assert (values["accuracy", "none"].value, values["normalised_accuracy", "none"].value) == (0.5, 1.0)
    assert values["accuracy", "none"].stderr == pytest.approx(math.sqrt(0.5 / 2))
    assert values["accuracy", "none"].higher_is_better is True
    sample = marks.samples[1]
    assert (sample.doc_id, sample.prompt, sample.target) == (1, "sun is", "yellowish")
    assert sample.responses == ("-3.0", "-6.0") and sample.extracted == ("red",)
    assert sample.metrics == (("accuracy", 0.0), ("normalised_accuracy", 1.0))
    assert sample.keys == (TWO[2][1].key, TWO[3][1].key)


def test_a_document_without_all_answers_is_left_out_not_wrong() -> None:
    leaf = recording(TWO, TWO_DOCUMENTS, output="multiple_choice", metrics=BOTH)
    requests = [r for _, r in TWO]
    broken = Failure(key=requests[3].key, boundary=Boundary.CONTEXT, message="too long", retryable=False)
    value = by_name(
        mark(leaf, [scored(requests[0], -1.0), scored(requests[1], -2.0), scored(requests[2], -3.0), broken])
    )["accuracy", "none"]
    assert (value.value, value.stderr, value.n, value.n_expected) == (1.0, None, 1, 2)
    coverage = value.coverage
    assert (coverage.requested, coverage.answered, coverage.failed) == (4, 3, 1)
    assert coverage.failures == (("context_length", 1),) and not coverage.complete
    nothing = by_name(mark(leaf, []))["accuracy", "none"]
    assert (nothing.value, nothing.n, nothing.coverage.answered, nothing.coverage.failed) == (None, 0, 0, 0)


def test_equal_choices_share_one_answer() -> None:
    requests = choosing((0, "x", " a"), (0, "x", " b"), (0, "x", " b"))
    leaf = recording(
        requests, [{"id": 0, "choices": ["a", "b", "b"], "gold": [1, 2]}], output="multiple_choice", metrics=BOTH[:1]
    )
    value = by_name(mark(leaf, [scored(requests[0][1], -2.0), scored(requests[1][1], -1.0)]))["accuracy", "none"]
    assert value.value == 1.0 and value.coverage.requested == value.coverage.answered == 3


ASK = [Request(kind=Kind.GENERATE, text=t) for t in ("capital of France", "capital of Spain", "capital of Italy")]
CAPITALS = [
    {"id": 0, "references": ["Paris"]},
    {"id": 1, "references": ["Madrid"]},
    {"id": 2, "references": ["Rome", "Roma"]},
]
WRITTEN = [
    {"metric": "exact_match", "ignore_case": True},
    {"metric": "contains"},
    {"metric": "f1"},
    {"metric": "regex", "pattern": "^[A-Z]"},
    {"metric": "exact_match", "name": "strict"},
]


def test_generation_with_extraction() -> None:
    steps = [{"regex": r"Answer: ([^.]*)", "which": "last"}, {"do": "strip"}]
    leaf = recording(list(enumerate(ASK)), CAPITALS, output="generate", metrics=WRITTEN, extract=steps)
    texts = ["Answer: Rome. No, Answer: paris .", "I do not know, Madrid?", "Answer: Roma"]
    marks = mark(leaf, [said(r, t) for r, t in zip(ASK, texts, strict=True)])
    values = by_name(marks)
    assert [marks.samples[i].extracted for i in range(3)] == [("paris",), ("",), ("Roma",)]
    assert marks.samples[1].responses == ("I do not know, Madrid?",)
    assert values["exact_match", "none"].value == pytest.approx(2 / 3)
    assert values["strict", "none"].value == pytest.approx(1 / 3)
    assert values["contains", "none"].value == pytest.approx(1 / 3), "nothing extracted is wrong, whatever was said"
    assert values["regex", "none"].value == pytest.approx(1 / 3)
    coverage = values["f1", "none"].coverage
    assert coverage.unparsable == 1 and coverage.complete
    assert marks.samples[2].target == '["Rome", "Roma"]'


def test_truncation_counts_cut_prompts_and_unexpected_ends() -> None:
    answers: list[Answer] = [
        said(ASK[0], "Paris", finish_reason="length"),
        said(ASK[1], "Madrid", finish_reason="stop", truncated_tokens=3),
        said(ASK[2], "Rome", finish_reason="stop"),
    ]
    for expects_stop, truncated in ((True, 2), (False, 1)):
        leaf = recording(
            list(enumerate(ASK)), CAPITALS, output="generate", metrics=WRITTEN[:1], expects_stop=expects_stop
        )
        value = by_name(mark(leaf, answers))["exact_match", "none"]
        assert (value.coverage.truncated, value.value) == (truncated, 1.0)


def test_repeats_score_the_first_and_the_mean() -> None:
    asked = [replace(ASK[d], sample_index=s) for d in (0, 1) for s in (0, 1)]
    leaf = recording(
        [(i // 2, r) for i, r in enumerate(asked)], CAPITALS[:2], repeats=2, output="generate", metrics=WRITTEN[:1]
    )
    answers = [said(r, t) for r, t in zip(asked, ["Paris", "Rome", "Rome", "Madrid"], strict=True)]
    marks = mark(leaf, list(answers))
    values = by_name(marks)
    assert (values["exact_match", "none"].value, values["exact_match", "mean@2"].value) == (0.5, 0.5)
    assert (values["exact_match", "none"].stderr, values["exact_match", "mean@2"].stderr) == (pytest.approx(0.5), 0.0)
    assert values["exact_match", "none"].n == 2 and values["exact_match", "none"].coverage.requested == 4
    means = [s for s in marks.samples if s.filter == "mean@2"]
    assert means[0].extracted == ("Paris", "Rome") and means[0].metrics == (("exact_match", 0.5),)
    partial = by_name(mark(leaf, list(answers[:3])))["exact_match", "none"]
    assert (partial.n, partial.value) == (1, 1.0), "a document that lacks one of its repeats is left out"


def test_passages() -> None:
    texts = ["one two", "three"]
    asked = [Request(kind=Kind.ROLLING, text=t) for t in texts]
    metrics = [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    leaf = recording(list(enumerate(asked)), [{"id": 0}, {"id": 1}], output="perplexity", metrics=metrics)
    marks = mark(leaf, [scored(asked[0], -6.0), scored(asked[1], -3.0)])
    values = by_name(marks)
    assert values["word_perplexity", "none"].value == pytest.approx(math.exp(3.0))
    assert values["byte_perplexity", "none"].value == pytest.approx(math.exp(9 / 12))
    assert values["bits_per_byte", "none"].value == pytest.approx(9 / 12 / math.log(2))
    assert values["word_perplexity", "none"].higher_is_better is False
    assert dict(marks.samples[1].metrics)["byte_perplexity"] == pytest.approx(math.exp(3 / 5))


def test_chat_prompts_are_shown_as_turns() -> None:
    request = Request(
        kind=Kind.GENERATE, messages=(Message(role="system", content="Be brief."), Message(role="user", content="Hi"))
    )
    leaf = recording([(0, request)], [{"id": 0, "references": ["x"]}], output="generate", metrics=WRITTEN[:1])
    assert mark(leaf, [said(request, "x")]).samples[0].prompt == "<system> Be brief.\n<user> Hi"


@pytest.mark.parametrize(
    ("text", "steps", "answer"),
    [
        ("#### 1,234", [{"regex": r"#### (\S+)"}, {"remove": ","}], "1234"),
        ("a1 b2 c3", [{"regex": r"\d", "which": "last"}], "3"),
        ("a1 b2 c3", [{"regex": r"([a-z])(\d)", "group": 2}], "1"),
        ("a1 b2", [{"regex": r"([a-z])(\d)", "group": 0}], "a1"),
        ("ab", [{"regex": r"(x)|b"}], None),
        ("nothing", [{"regex": r"\d"}, {"do": "strip"}], None),
        ("\nYes\r\nmore", [{"do": "first_line"}, {"do": "lower"}], "yes"),
        (" up ", [{"do": "upper"}], " UP "),
        ("", [], ""),
        ("<think>no</think> yes", [{"remove": "(?s)<think>.*?</think>"}, {"do": "strip"}], "yes"),
    ],
)
def test_extract(text: str, steps: list[dict[str, Any]], answer: str | None) -> None:
    assert extract(text, [ExtractStep.model_validate(s) for s in steps]) == answer


def test_what_does_not_belong_is_refused() -> None:
    leaf = recording(TWO, TWO_DOCUMENTS, output="multiple_choice", metrics=BOTH)
    suite = Suite(id="s", source="native", names=("t",), num_fewshot=None, recordings=("0" * 64,), settings="{}")
    with pytest.raises(HarnessError, match="recording 000000000000 is not there"):
        NativeReplay().mark(suite, [leaf], {})
    for documents in (
        "{}",
        "nonsense",
        json.dumps({"marking": json.loads(leaf.documents)["marking"], "documents": []}),
    ):
        with pytest.raises(HarnessError, match="is no native recording"):
            mark(replace(leaf, documents=documents), [])
    with pytest.raises(HarnessError, match="no log-probability"):
        mark(leaf, [said(r, "x") for _, r in TWO])
    written = recording([(0, ASK[0])], CAPITALS[:1], output="generate", metrics=WRITTEN[:1])
    with pytest.raises(HarnessError, match="has no text"):
        mark(written, [scored(ASK[0], -1.0)])
