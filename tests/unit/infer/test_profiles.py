"""Windows, keys and digests; that the profiles equal lm-eval's classes is shown in tests/parity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.config.spec import OpenAIEngine as Spec
from proctor.infer.client import Client
from proctor.infer.engine import PhysicalRequest, Sampling
from proctor.infer.profiles import (
    DoesNotFit,
    Rules,
    finish_text,
    fit_prompt,
    fit_scored,
    generation_key,
    move_spaces,
    resolution_digest,
    rolling_passages,
    window_length,
)
from proctor.infer.profiles_sampling import CannotExpress, resolve_generation
from proctor.infer.resolve import Resolver
from proctor.records import Boundary, Failure, Kind, Message, Request, canonical_json
from proctor.testing import write_byte_tokenizer

PROFILES = ["hf", "vllm", "local-completions"]


def rules(profile: str, max_length: int = 10, **fields: Any) -> Rules:
    return Rules(profile=profile, max_length=max_length, prefix_id=999, bos="<s>", eos="</s>", **fields)


def resolver(directory: Path, **spec: Any) -> Resolver:
    return Resolver(Spec(**spec), directory, client=Client(lambda: []))


@pytest.mark.parametrize(("profile", "kept"), [("hf", 11), ("vllm", 9), ("local-completions", 9)])
def test_a_scored_request_keeps_the_end_of_its_context(profile: str, kept: int) -> None:
    passage, cut = fit_scored(rules(profile), list(range(20)), [50, 51])
    assert passage.token_ids == (*range(20 - kept + 2, 20), 50, 51)
    assert (passage.scored, cut) == (2, 22 - kept)
    with pytest.raises(DoesNotFit):
        fit_scored(rules(profile), [1], list(range(kept)))


@pytest.mark.parametrize(("profile", "room"), [("hf", 6), ("vllm", 6), ("local-completions", 5)])
def test_a_prompt_leaves_room_for_what_is_generated(profile: str, room: int) -> None:
    assert fit_prompt(rules(profile), list(range(20)), 4) == (list(range(20 - room, 20)), 20 - room)
    assert fit_prompt(rules(profile), [1, 2], 4) == ([1, 2], 0)
    with pytest.raises(DoesNotFit, match="max_length"):
        fit_prompt(rules(profile), [1], 10)


@given(profile=st.sampled_from(PROFILES), length=st.integers(0, 200), window=st.integers(3, 40))
def test_rolling_windows_score_every_token_once_in_order(profile: str, length: int, window: int) -> None:
    passages = rolling_passages(rules(profile, window), list(range(length)))
    assert [t for p in passages for t in p.token_ids[-p.scored :]] == list(range(length))
    for passage in passages:
        assert passage.scored < len(passage.token_ids) <= rules(profile, window).scored_window
        context = passage.token_ids[: -passage.scored]
        if context[0] == 999:
            assert passage is passages[0]
        else:
            assert context[-1] == passage.token_ids[-passage.scored] - 1


def test_spaces_belong_to_the_continuation() -> None:
    assert move_spaces("a b \n", "c") == ("a b", " \nc")


def test_the_window_comes_from_the_spec_then_the_model() -> None:
    config = {"max_position_embeddings": 512, "text_config": {"n_positions": 128}}
    assert window_length(Spec(profile="hf", max_length=77), config, {}) == 77
    assert window_length(Spec(profile="hf"), config, {}) == 128
    assert window_length(Spec(profile="vllm"), {"n_ctx": 9}, {}) == 9
    assert window_length(Spec(profile="hf"), {}, {"model_max_length": 300}) == 300
    assert window_length(Spec(profile="hf"), {}, {"model_max_length": 10**30}) == 2048
    assert window_length(Spec(), config, {}) == 2048


@pytest.mark.parametrize(
    ("profile", "raw", "temperature"),
    [
        ("hf", {}, 0.0),
        ("hf", {"do_sample": False, "temperature": 1.0}, 0.0),
        ("hf", {"temperature": 0.5}, 0.5),
        ("vllm", {}, 1.0),
        ("vllm", {"do_sample": False, "temperature": 1.0}, 0.0),
        ("vllm", {"do_sample": False}, 0.0),
        ("local-completions", {}, 0.0),
        ("local-completions", {"do_sample": False, "temperature": 1.0}, 1.0),
    ],
)
def test_do_sample_means_what_it_means_in_each_class(profile: str, raw: dict[str, Any], temperature: float) -> None:
    found = resolve_generation(profile, raw, default_length=256, eos="</s>", defaults={})
    assert found.sampling.temperature == temperature


def test_only_hf_obeys_the_models_generation_config() -> None:
    defaults = {"repetition_penalty": 1.3, "temperature": 0.6, "top_p": 0.8}
    values = {
        p: resolve_generation(p, {"until": ["x"]}, default_length=8, eos=None, defaults=defaults).sampling
        for p in PROFILES
    }
    assert values["hf"].repetition_penalty == 1.3
    assert values["hf"].temperature == 0.0
    assert values["vllm"].repetition_penalty == values["local-completions"].repetition_penalty == 1.0


@pytest.mark.parametrize("raw", [{"num_beams": 4}, {"do_sample": True}, {"watermark": 1}, {"until": 3}])
def test_hf_refuses_what_a_server_cannot_do(raw: dict[str, Any]) -> None:
    with pytest.raises(CannotExpress):
        resolve_generation("hf", raw, default_length=8, eos=None, defaults={})


def test_text_is_cut_at_stops_where_the_class_does_it_again() -> None:
    sampling = Sampling(max_tokens=4, stop=("\n", "</s>"))
    assert finish_text("hf", "one</s>\ntwo", sampling) == "one"
    assert finish_text("vllm", "one\ntwo", sampling) == "one"
    assert finish_text("local-completions", "one\ntwo", sampling) == "one\ntwo"


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Sampling)])
def test_every_sampling_field_is_part_of_the_physical_key(field: str) -> None:
    other: dict[str, Any] = {"stop": ("x",), "stop_token_ids": (3,), "extra": '{"a":1}'}
    base = Sampling(max_tokens=5)
    changed = dataclasses.replace(base, **{field: other.get(field, 7)})
    assert generation_key([1, 2], base, sample=None) != generation_key([1, 2], changed, sample=None)


async def test_tasks_that_ask_the_same_share_a_physical_request(tmp_path: Path) -> None:
    # The same question as text and as a conversation, and with the space on either side of the border.
    directory = write_byte_tokenizer(tmp_path)
    greedy = canonical_json({"until": ["\n"], "max_gen_toks": 4})
    verbose = canonical_json({"until": ["\n"], "max_gen_toks": 4, "do_sample": False, "temperature": 0.0})
    chat = Request(kind=Kind.GENERATE, messages=(Message(role="user", content="Hi"),), arguments=greedy)
    requests = [
        chat,
        Request(kind=Kind.GENERATE, text="[user]Hi\n[assistant]", arguments=verbose),
        Request(kind=Kind.LOGLIKELIHOOD, text="a", continuation=" b"),
        Request(kind=Kind.LOGLIKELIHOOD, text="a ", continuation="b"),
    ]
    keys = [r.physical_key for r in await resolver(directory).resolve(requests)]
    assert keys[0] == keys[1]
    assert keys[2] == keys[3] != keys[0]


async def test_truncation_is_counted_or_refused(tmp_path: Path) -> None:
    directory = write_byte_tokenizer(tmp_path)
    arguments = canonical_json({"until": ["\n"], "max_gen_toks": 4})
    requests = [
        Request(kind=Kind.GENERATE, text="x" * 50, arguments=arguments),
        Request(kind=Kind.LOGLIKELIHOOD, text="x" * 50, continuation=" y"),
        Request(kind=Kind.LOGLIKELIHOOD, text="x", continuation=" y" * 40),
    ]
    cutting = resolver(directory, max_length=20, truncation="truncate_left")
    generated, scored, hopeless = await cutting.resolve(requests)
    assert isinstance(generated, PhysicalRequest) and isinstance(scored, PhysicalRequest)
    assert (generated.truncated_tokens, scored.truncated_tokens) == (35, 33)
    assert isinstance(hopeless, Failure) and hopeless.boundary is Boundary.CONTEXT
    for failure in await resolver(directory, max_length=20).resolve(requests):
        assert isinstance(failure, Failure)
        assert (failure.boundary, failure.retryable) == (Boundary.CONTEXT, False)
    assert "truncate_left" in failure.message or "continuation alone" in failure.message


@pytest.mark.parametrize(("own", "fits"), [(None, True), (4096, True), (2100, False)])
async def test_what_is_not_cut_has_the_models_own_window(tmp_path: Path, own: int | None, fits: bool) -> None:
    """lm-eval's class takes 2048 for the window of any server."""
    directory = write_byte_tokenizer(tmp_path)
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": own} if own else {}))
    said = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(said | {"model_max_length": 10**30}))
    requests = [
        Request(kind=Kind.GENERATE, text="x" * 2090, arguments=canonical_json({"max_gen_toks": 40})),
        Request(kind=Kind.LOGLIKELIHOOD, text="x" * 2110, continuation="y"),
    ]
    client = Client(lambda: [])
    found = await Resolver(Spec(), directory, client=client, model_directory=directory).resolve(requests)
    assert [isinstance(one, PhysicalRequest) for one in found] == [fits, fits]
    assert all(one.truncated_tokens == 0 for one in found if isinstance(one, PhysicalRequest))


async def test_extra_body_is_sent_and_keyed(tmp_path: Path) -> None:
    directory = write_byte_tokenizer(tmp_path)
    requests = [
        Request(kind=Kind.GENERATE, text="x", arguments="{}"),
        Request(kind=Kind.LOGLIKELIHOOD, text="x", continuation="y"),
    ]
    plain = await resolver(directory).resolve(requests)
    extra = await resolver(directory, extra_body={"top_a": 1}).resolve(requests)
    assert all(a.physical_key != b.physical_key for a, b in zip(plain, extra, strict=True))
    assert isinstance(extra[0], PhysicalRequest) and extra[0].sampling is not None
    assert json.loads(extra[0].sampling.extra) == {"top_a": 1}


def test_the_resolution_digest_changes_with_everything_that_changes_requests() -> None:
    def of(tokenizer: str = "t", template: str = "c", max_length: int = 5, **spec: Any) -> str:
        return resolution_digest(Spec(**spec), tokenizer=tokenizer, template=template, max_length=max_length)

    variants = [
        of(),
        of(tokenizer="u"),
        of(template="d"),
        of(max_length=6),
        of(profile="hf"),
        of(truncation="truncate_left"),
        of(add_bos_token=True),
        of(max_gen_toks=3),
        of(extra_body={"a": 1}),
        of(seed=1),
        of(template_date="2020-01-01"),
    ]
    assert len(set(variants)) == len(variants)
    assert of(max_in_flight=2, timeout_s=3, retries=1) == of()
