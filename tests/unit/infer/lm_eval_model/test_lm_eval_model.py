"""The engine against a stand-in for lm-eval: a package of that name with the same few entry points."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from proctor.config.spec import LmEvalModelEngine as Spec
from proctor.errors import MissingTool, ServerError, UnknownName
from proctor.infer.engine import PhysicalRequest
from proctor.infer.lm_eval_model import LmEvalModelEngine, Pace
from proctor.infer.lm_eval_resolution import resolution_digest
from proctor.records import Answer, Boundary, Failure, Kind, Message, Request, Response

REGISTRY = """
    import os, sys, time

    class Model:
        chat_template_args = {}
        dtype = "float64"
        device = "cpu"

        def __init__(self, pretrained=None, revision=None, batch_size=1, max_batch_size=None, device=None, **more):
            print("loading", pretrained, revision, batch_size, more, flush=True)
            print("noise on standard output" * 3)
            if more.get("fail"):
                raise ValueError(more["fail"])
            self.more = more

        @classmethod
        def create_from_arg_obj(cls, arguments, common):
            return cls(**arguments, **{k: v for k, v in common.items() if v is not None})

        def _slice(self, kind, requests):
            print("slice", kind, [r.args[0] for r in requests], flush=True)
            for request in requests:
                text = request.args[0]
                if "raise" in text:
                    raise ValueError("cannot do this one")
                if "memory" in text and len(requests) > 2:
                    raise RuntimeError("CUDA out of memory. Tried to allocate")
                if "assert" in text:
                    raise RuntimeError("CUDA error: device-side assert triggered")
                if "die" in text:
                    print("last words", flush=True)
                    os._exit(9)
                if "slow" in text:
                    time.sleep(0.5)

        def loglikelihood(self, requests):
            self._slice("loglikelihood", requests)
            return [(float(r.args[1].strip() or "nan"), "greedy" in r.args[0]) for r in requests]

        def loglikelihood_rolling(self, requests):
            self._slice("rolling", requests)
            return [-float(len(r.args[0])) for r in requests]

        def generate_until(self, requests):
            self._slice("generate", requests)
            return [f"{r.args[0]}|{sorted(r.args[1].items())}" for r in requests]

        def apply_chat_template(self, history, add_generation_prompt=True):
            if any(turn["role"] == "tool" for turn in history):
                raise ValueError("no tools here")
            turns = ";".join(f"{turn['role']}={turn['content']}" for turn in history)
            return f"{turns};{add_generation_prompt};{sorted(self.chat_template_args.items())}"

    model_registry = {"stand-in": Model, "other": Model}

    def get_model(name):
        return model_registry[name]
"""
INSTANCE = """
    class Instance:
        def __init__(self, *, request_type, doc, arguments, idx):
            self.args = arguments
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the path of child processes, with our stand-in."""
    api = tmp_path / "site" / "lm_eval" / "api"
    api.mkdir(parents=True)
    (api.parent / "__init__.py").touch()
    (api / "__init__.py").touch()
    (api / "registry.py").write_text(textwrap.dedent(REGISTRY))
    (api / "instance.py").write_text(textwrap.dedent(INSTANCE))
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path / "site"), inherited))))
    return tmp_path


def engine(tmp_path: Path, *, slice_size: int = 4, **fields) -> LmEvalModelEngine:
    spec = Spec(**{"model": "stand-in", "slice_size": slice_size} | fields)
    return LmEvalModelEngine(spec, path=str(tmp_path / "a $(model)\n'x'"), log=tmp_path / "host.log", revision="r")


async def feed(requests: Iterable[PhysicalRequest]) -> AsyncIterator[PhysicalRequest]:
    for request in requests:
        yield request


async def ask(one: LmEvalModelEngine, requests: list[Request]) -> dict[str, Answer]:
    physical = await one.resolve(requests)
    answers = [answer async for answer in one.run(feed([p for p in physical if isinstance(p, PhysicalRequest)]))]
    assert len(answers) == len(requests)
    return {answer.key: answer for answer in answers}


def scored(text: str, continuation: str = " -1.5") -> Request:
    return Request(kind=Kind.LOGLIKELIHOOD, text=text, continuation=continuation)


def generation(text: str = "t", arguments: str = '{"until":["x"]}', **fields) -> Request:
    return Request(kind=Kind.GENERATE, text=text, arguments=arguments, **fields)


async def test_each_kind_is_asked_and_answered(harness: Path) -> None:
    requests = [
        scored("greedy"),
        scored("b", " -2"),
        Request(kind=Kind.ROLLING, text="four"),
        generation("g", '{"do_sample":true,"until":["\\n"]}', sample_index=1),
        generation("h"),
    ]
    async with engine(harness, model_args={"x": 1}, batch_size=3) as one:
        answers = await ask(one, requests)
        got = [answers[request.key] for request in requests]
        assert all(isinstance(answer, Response) and answer.engine_id == one.info.id for answer in got)
        assert [(a.logprob, a.is_greedy) for a in got[:3]] == [(-1.5, True), (-2.0, False), (-4.0, None)]
        assert got[3].text == "g|[('do_sample', True), ('until', ['\\n'])]"
        assert [a.seed_honoured for a in got[3:]] == [False, None]
        assert (one.info.engine, one.info.dtype, one.info.method) == ("lm_eval:stand-in", "float64", "in-process")
        assert '"batch_size":3' in one.info.details
    log = (harness / "host.log").read_text()
    assert "a $(model)\n'x' r 3 {'x': 1}" in log
    assert "noise on standard output" in log


async def test_conversations_are_rendered_by_the_class(harness: Path) -> None:
    turns = (Message(role="user", content="hi"),)
    plain = generation(messages=turns)
    prefix = generation(messages=turns, add_generation_prompt=False, template_arguments='{"thinking":true}')
    tool = generation(messages=(Message(role="tool", content="x"),))
    async with engine(harness) as one:
        answers = await ask(one, [plain, prefix, tool])
    first, second, third = (answers[request.key] for request in (plain, prefix, tool))
    assert isinstance(first, Response) and isinstance(second, Response)
    assert first.text == "user=hi;True;[]|[('until', ['x'])]"
    assert second.text == "user=hi;False;[('thinking', True)]|[('until', ['x'])]"
    assert isinstance(third, Failure)
    assert (third.boundary, third.retryable, third.message) == (
        Boundary.RENDER,
        False,
        "ValueError: no tools here",
    )


async def test_one_request_that_raises_costs_no_other_its_answer(harness: Path) -> None:
    requests = [scored(text) for text in ("a", "b", "c raise", "d", "e", "f", "g", "h raise")]
    async with engine(harness, slice_size=8) as one:
        answers = await ask(one, requests)
    failures = {key: answer for key, answer in answers.items() if isinstance(answer, Failure)}
    assert set(failures) == {requests[2].key, requests[7].key}
    for failure in failures.values():
        assert failure.boundary is Boundary.ENGINE
        assert failure.message == "ValueError: cannot do this one"
        assert not failure.retryable


async def test_a_slice_too_large_for_the_memory_is_halved(harness: Path) -> None:
    requests = [generation(f"memory {n}") for n in range(8)]
    async with engine(harness, slice_size=8) as one:
        answers = await ask(one, requests)
    assert all(isinstance(answer, Response) for answer in answers.values())


async def test_a_log_probability_that_is_no_number_is_a_failure(harness: Path) -> None:
    good, bad = scored("a"), scored("b", " ")
    async with engine(harness) as one:
        answers = await ask(one, [good, bad])
    assert isinstance(answers[good.key], Response)
    failure = answers[bad.key]
    assert isinstance(failure, Failure)
    assert failure.message == "the log-probability is nan"


@pytest.mark.parametrize(("text", "said"), [("die", "exit status 9"), ("assert", "device-side assert")])
async def test_what_was_answered_before_the_host_was_lost_stands(harness: Path, text: str, said: str) -> None:
    requests = [scored("a"), scored("b"), scored(f"z {text}"), scored("zz")]
    answers: list[Answer] = []
    async with engine(harness, slice_size=2) as one:
        physical = await one.resolve(requests)
        with pytest.raises(ServerError, match=said) as caught:
            async for answer in one.run(feed(physical)):
                answers.append(answer)
        assert caught.value.state == "died"
        assert str(harness / "host.log") in caught.value.message
    assert {answer.key for answer in answers} == {request.key for request in requests[:2]}


async def test_killed_host_is_reported_and_another_can_be_started(harness: Path, descendants) -> None:
    one = engine(harness)
    with pytest.raises(ServerError, match="exit status 137"):
        async with one:
            for child in descendants():
                if "lm_eval_host" in " ".join(child.cmdline()) and "guard.py" not in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)
            await ask(one, [scored("a")])
    async with one:
        assert await ask(one, [scored("a")])


async def test_equal_contexts_of_a_slice_stand_side_by_side(harness: Path) -> None:
    async with engine(harness, slice_size=6) as one:
        await ask(
            one, [scored("b", " -1"), scored("a", " -1"), generation("g"), scored("b", " -2"), scored("a", " -2")]
        )
    log = (harness / "host.log").read_text()
    assert "slice loglikelihood ['a', 'a', 'b', 'b']" in log


async def test_answers_come_slice_by_slice_and_no_more_is_taken_than_needed(harness: Path) -> None:
    taken = 0

    async def counted(physical: list[PhysicalRequest]) -> AsyncIterator[PhysicalRequest]:
        nonlocal taken
        for request in physical:
            taken += 1
            yield request

    async with engine(harness, slice_size=2) as one:
        physical = [
            p for p in await one.resolve([scored(f"{n:02}") for n in range(20)]) if isinstance(p, PhysicalRequest)
        ]
        answers = one.run(counted(physical))
        await anext(answers)
        assert taken <= 5
        await answers.aclose()
        # The slice that was under way when the asker left does not answer the next question.
        again = await ask(one, [scored("later", " -7")])
        assert [answer.logprob for answer in again.values() if isinstance(answer, Response)] == [-7.0]


async def test_a_trickle_is_not_held_back_until_a_slice_is_full(harness: Path) -> None:
    async def trickle(physical: list[PhysicalRequest]) -> AsyncIterator[PhysicalRequest]:
        yield physical[0]
        await asyncio.sleep(30)
        yield physical[1]

    async with engine(harness, slice_size=100) as one:
        physical = [p for p in await one.resolve([scored("a"), scored("b")]) if isinstance(p, PhysicalRequest)]
        started = time.monotonic()
        answers = one.run(trickle(physical))
        assert (await anext(answers)).key == physical[0].key
        assert time.monotonic() - started < 10
        await answers.aclose()


async def test_what_the_source_raises_comes_out(harness: Path) -> None:
    async def broken(physical: list[PhysicalRequest]) -> AsyncIterator[PhysicalRequest]:
        yield physical[0]
        raise LookupError("the plan is gone")

    async with engine(harness) as one:
        physical = [p for p in await one.resolve([scored("a")]) if isinstance(p, PhysicalRequest)]
        answers = one.run(broken(physical))
        assert (await anext(answers)).key == physical[0].key
        with pytest.raises(LookupError, match="the plan is gone"):
            await anext(answers)


# --- loading that fails ---------------------------------------------------------------------------


async def test_a_model_that_does_not_load_shows_why(harness: Path, descendants) -> None:
    with pytest.raises(ServerError, match="ValueError: not enough of it") as caught:
        async with engine(harness, model_args={"fail": "not enough of it"}):
            pass
    assert caught.value.state == "failed"
    assert "Traceback" in (harness / "host.log").read_text()
    assert not descendants()


async def test_an_unknown_class_names_the_known_ones(harness: Path) -> None:
    with pytest.raises(UnknownName, match="unknown lm-eval model class 'stand-inn'; did you mean 'stand-in'"):
        async with engine(harness, model="stand-inn"):
            pass


async def test_an_interpreter_without_lm_eval(tmp_path: Path) -> None:
    python = f"{sys.base_prefix}/bin/python3"
    with pytest.raises(MissingTool, match="has no lm-eval"):
        async with engine(tmp_path, python=python):
            pass


# --- keys -----------------------------------------------------------------------------------------


async def keys(one: LmEvalModelEngine, *requests: Request) -> list[str]:
    return [item.physical_key for item in await one.resolve(requests)]


async def test_greedy_repeats_are_one_question_and_sampled_ones_are_not(tmp_path: Path) -> None:
    one = engine(tmp_path)
    greedy = '{"do_sample":false,"temperature":0.0}'
    first, second = await keys(
        one, generation(arguments=greedy), generation(arguments=greedy, sample_index=1, replicate=2)
    )
    assert first == second
    for arguments in ('{"do_sample":true}', '{"temperature":0.5}'):
        drawn = await keys(
            one,
            generation(arguments=arguments),
            generation(arguments=arguments, sample_index=1),
            generation(arguments=arguments, replicate=1),
        )
        assert len(set(drawn)) == 3


async def test_what_the_class_is_told_is_part_of_the_key_but_where_it_runs_is_not(tmp_path: Path) -> None:
    base = await keys(engine(tmp_path), scored("a"))
    assert await keys(engine(tmp_path, batch_size=8, device="cuda", slice_size=9), scored("a")) == base
    assert await keys(engine(tmp_path, model_args={"max_length": 99}), scored("a")) != base
    assert await keys(engine(tmp_path, model="other"), scored("a")) != base


def test_resolution_digest_covers_tokenizer_template_and_generation_defaults() -> None:
    spec = Spec(model="hf")
    seen = {
        resolution_digest(spec, tokenizer="t", template="c"),
        resolution_digest(spec, tokenizer="u", template="c"),
        resolution_digest(spec, tokenizer="t", template="d"),
        resolution_digest(spec, tokenizer="t", template="c", generation_config={"repetition_penalty": 1.2}),
    }
    assert len(seen) == 4


def test_slices_grow_while_they_are_quick_and_shrink_when_they_are_slow() -> None:
    pace = Pace(1, 100)
    sizes = []
    for seconds in (0.1, 0.1, 4.9, 0.1, 0.1, 6.0, 19.0, 25.0, 0.1):
        sizes.append(pace.size)
        pace.took(pace.size, seconds)
    assert sizes == [8, 16, 32, 64, 100, 100, 100, 100, 48]
    assert pace.size == 96
    pace.took(3, 0.1)
    assert pace.size == 96, "a slice that was not full says nothing about larger ones"
    for _ in range(9):
        pace.took(1, 1000.0)
    assert pace.size == 8


def test_slices_are_whole_batches() -> None:
    pace = Pace(12, 256)
    sizes = []
    for seconds in (1.0, 1.0, 1.0, 1.0, 1.0, 99.0, 99.0):
        sizes.append(pace.size)
        pace.took(pace.size, seconds)
    assert sizes == [12, 24, 48, 96, 192, 252, 120]
    assert Pace(32, 100).size == 32 and Pace(32, 100).largest == 96
    assert Pace(64, 10).size == 10
    assert Pace("auto", 300).size == 300
