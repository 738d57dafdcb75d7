"""A real vLLM (CPU build): start, key, identity, death of its engine process, errors with hints."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import struct
import time
from dataclasses import replace
from pathlib import Path

import aiohttp
import psutil
import pytest
from tokenizers import Tokenizer

from proctor.config.spec import OpenAIEngine as EngineSpec
from proctor.config.spec import VllmServer
from proctor.errors import ServerError
from proctor.infer.client import Client, Reply
from proctor.infer.openai import OpenAIEngine
from proctor.infer.server import Backend, ServedModel, ServerPaths
from proctor.infer.servers.build import build_server
from proctor.infer.servers.launched import LaunchedServer
from proctor.infer.servers.reload import State, Weights, probe_tokens
from proctor.records import METHODS, Kind, Request, Response
from proctor.worker.events import EventLog, read_events
from proctor.worker.handover import Handover
from proctor.worker.job import Job
from proctor.worker.run_directory import RunDirectory
from proctor.worker.serving import serving

from ..unit.infer.asking import respond

PYTHON = os.environ.get("PROCTOR_VLLM_PYTHON") or None
MODELS = os.environ.get("PROCTOR_TEST_MODELS")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None or MODELS is None, reason="PROCTOR_VLLM_PYTHON and PROCTOR_TEST_MODELS are not set"
    ),
]


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerPaths:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    return ServerPaths(logs=tmp_path / "logs", scratch=tmp_path / "scratch")


@pytest.fixture
def model() -> ServedModel:
    return ServedModel(path=str(Path(MODELS or "") / "tiny"), name="tiny $(model)")


async def complete(backend: Backend, key: str | None) -> int:
    body = {"model": backend.served_model, "prompt": "Hi", "max_tokens": 3, "temperature": 0}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{backend.url}/v1/completions", json=body, headers=headers) as response,
    ):
        return response.status


def family() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.mark.timeout(600)
async def test_vllm_answers_survives_the_death_of_its_engine_and_leaves_nothing(
    paths: ServerPaths, model: ServedModel
) -> None:
    args = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    async with build_server(VllmServer(python=PYTHON, args=args, restarts=1), model, paths=paths) as server:
        assert server.info.engine == "vllm"
        assert server.info.version[0].isdigit()
        assert server.info.dtype == "float32"
        backend = server.backends[0]
        assert backend.served_model == model.name
        assert await complete(backend, None) == 401
        assert await complete(backend, backend.api_key) == 200
        # The engine is a process of its own: the API process outlives it for a while.
        engine = next(process for process in family() if "EngineCore" in " ".join(process.cmdline()))
        engine.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 240
        while server.backends[0] == backend:
            assert time.monotonic() < deadline, "the death of the engine was not noticed"
            await server.ensure()
            await asyncio.sleep(0.5)
        assert await complete(server.backends[0], backend.api_key) == 200
        started = family()
        assert backend.api_key is not None
        assert not any(backend.api_key in " ".join(process.cmdline()) for process in started)
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not any(backend.api_key in log.read_text() for log in paths.logs.iterdir())


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ({"max_model_len": 999_999}, "lower max_model_len"),
        ({"no_such_option": 1}, "not one of its options"),
        ({"tensor_parallel_size": 5}, "tensor_parallel_size"),
    ],
)
async def test_vllm_failures_have_hints(paths: ServerPaths, model: ServedModel, args: dict, hint: str) -> None:
    with pytest.raises(ServerError) as caught:
        async with build_server(VllmServer(python=PYTHON, args=args), model, paths=paths):
            raise AssertionError("it started")
    assert caught.value.state == "failed"
    assert hint in str(caught.value.hint), caught.value.message


# --- log-likelihoods ---


@pytest.mark.timeout(600)
async def test_vllm_echoes_on_top_of_its_prefix_cache(paths: ServerPaths, model: ServedModel) -> None:
    """Choices of several tokens share their context, and have the log-probabilities of plain echo."""
    args = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "block_size": 32}
    examples = "The dog barks at night. The cat sleeps all day. " * 2
    tokenizer = Tokenizer.from_file(str(Path(model.path) / "tokenizer.json"))
    contexts = [f"{examples}Story {i}: she opened the door and" for i in range(16)]
    # The last token of these is found in the cache.
    longer = (f"{context}{' and' * n}" for context in contexts[:8] for n in range(32))
    at_block = [text for text in longer if len(tokenizer.encode(text).ids) % 32 == 0]
    requests = [
        Request(kind=Kind.LOGLIKELIHOOD, text=text, continuation=end)
        for text in (*at_block, *contexts)
        for end in (" walked along the river.", " walked home.", " sang a song of long ago.", " was late for it.")
    ]
    assert len(at_block) >= 4
    answers: dict[str, list[Response]] = {}
    async with build_server(VllmServer(python=PYTHON, args=args), model, paths=paths) as server:
        # Plain echo second: it does not read the cache, but leaves every prompt in it.
        for way in ("auto", "echo"):
            engine = OpenAIEngine(
                EngineSpec(loglikelihood=way),
                backends=lambda: server.backends,
                info=lambda: server.info,
                tokenizer=Path(model.path),
            )
            async with engine:
                answers[way] = await respond(engine, requests)
                assert engine.conformance is not None
                assert engine.conformance.cached_echo is (True if way == "auto" else None)
        methods = {replace(server.info, method=method).id: method for method in METHODS}
    taken = [methods[a.engine_id] for a in answers["auto"]]
    assert taken.count("cached-echo") > len(requests) / 2
    assert taken[: 4 * len(at_block)].count("cached-echo") > 2 * len(at_block)
    assert set(taken) <= {"cached-echo", "next-token", "echo"}  # what the server cannot say is asked for otherwise
    assert {methods[a.engine_id] for a in answers["echo"]} == {"echo"}
    for mine, plain in zip(answers["auto"], answers["echo"], strict=True):
        assert mine.token_logprobs == pytest.approx(plain.token_logprobs, abs=1e-4)
        assert mine.is_greedy is plain.is_greedy


# --- answers that the server cuts short ---


@pytest.mark.timeout(600)
async def test_what_a_paused_vllm_cuts_short_is_asked_again(
    paths: ServerPaths, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    args = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    body = {"prompt": [3, 4, 5], "max_tokens": 240, "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
    async with build_server(VllmServer(python=PYTHON, args=args), model, paths=paths) as server:
        backend = server.backends[0]
        headers = {"Authorization": f"Bearer {backend.api_key}"}
        async with (
            Client(lambda: server.backends) as client,
            aiohttp.ClientSession(backend.url, headers=headers, raise_for_status=True) as session,
        ):
            whole = await client.post("/v1/completions", body)
            asking = asyncio.create_task(client.post("/v1/completions", body))
            named = body | {"model": backend.served_model}
            # So many beside it that none is done when the server is stopped, however quick it is.
            plain = [asyncio.create_task(session.post("/v1/completions", json=named)) for _ in range(64)]
            await asyncio.sleep(0.1)
            await session.post("/pause", params={"mode": "abort"})
            cut = [(await (await one).json())["choices"][0] for one in plain]
            await session.post("/resume")
            again = await asking
    assert {one["finish_reason"] for one in cut} == {"abort"}
    assert all(len(one["token_ids"]) < 240 for one in cut)
    assert isinstance(whole, Reply)
    assert isinstance(again, Reply)
    assert again.attempts > 1
    assert again.value["choices"][0]["token_ids"] == whole.value["choices"][0]["token_ids"]


# --- other weights in a running server ---


def other_weights(source: Path, place: Path, *, seed: int) -> Path:
    """A copy of a float32 model in which every tensor is another: a sixteenth of its numbers are negated."""
    shutil.copytree(source, place)
    data = bytearray((place / "model.safetensors").read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    chosen = random.Random(seed)
    for tensor in (one for name, one in header.items() if name != "__metadata__"):
        assert tensor["dtype"] == "F32"
        start, end = (8 + size + at for at in tensor["data_offsets"])
        for at in chosen.sample(range(start + 3, end, 4), (end - start) // 64):
            data[at] ^= 0x80
    (place / "model.safetensors").write_bytes(data)
    return place


@pytest.mark.timeout(1200)
async def test_vllm_keeps_its_process_for_another_checkpoint_only_if_it_answers_as_a_fresh_one_to_every_bit(
    tmp_path: Path, paths: ServerPaths
) -> None:
    del paths  # for the environment that it sets
    places = [other_weights(Path(MODELS or "") / "tiny", tmp_path / f"step{n}", seed=n) for n in range(3)]
    args = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    await swap_among(places, directory=tmp_path / "run", python=PYTHON or "", args=args)


async def swap_among(places: list[Path], *, directory: Path, python: str, args: dict, gpus: int = 0) -> None:
    """Three checkpoints, as one worker takes them. The third is loaded into the second one's server, and then answers
    as a server of its own does; or that was refused for the one reason that is known."""
    run = RunDirectory(directory)
    run.create()
    spec = VllmServer(python=python, args=args, swap="reload", gpus=gpus)
    jobs = [job_of(place, f"step{n}", spec, run) for n, place in enumerate(places)]
    states: list[State] = []
    async with Handover(run) as handover:
        for number, job in enumerate(jobs):
            handover.next = f"step{number + 1}.json" if number < 2 else None
            with EventLog(run.events / f"{number}.jsonl", worker="w", model=job.model) as events:
                async with serving(job, None, worker=f"w{number}", events=events, handover=handover) as server:
                    assert isinstance(server, LaunchedServer)
                    assert ("weights" in json.loads(server.info.details)) is events.reloaded
                    assert not events.reloaded or number == 2
                    states.append(await state_of(server, job))
    assert len({one.said for one in states}) == 3
    if events.reloaded:
        fresh = job_of(places[2], "alone", spec, run)
        async with Handover(run) as handover:
            with EventLog(run.events / "3.jsonl", worker="w", model="alone") as events:
                async with serving(fresh, None, worker="w3", events=events, handover=handover) as server:
                    assert isinstance(server, LaunchedServer)
                    assert states[2] == await state_of(server, fresh)
    else:
        # So it is with vllm-cpu 0.32: HTTP 200, equal digests, and answers of a mixture of two checkpoints.
        (why,) = [e.message for e in read_events(run.events / "2.jsonl")[0] if "another is started" in e.message]
        assert "other answers than on a fresh server" in why


def job_of(place: Path, name: str, spec: VllmServer, run: RunDirectory) -> Job:
    job = Job(
        run="r",
        run_directory=str(run.root),
        store="s",
        model=name,
        display_name=name,
        weights=name,
        resolution="r",
        engine={"type": "openai", "server": spec.model_dump(mode="json")},
        path=str(place),
        served_model=name,
    )
    job.write(run.jobs / f"{name}.json")
    return job


async def state_of(server: LaunchedServer, job: Job) -> State:
    return await Weights(server.backends[0], probe_tokens(job.path), timeout_s=120).state()
