"""Weights that are loaded into a running server: used where that is seen to be right, and never where it is not."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from proctor import api
from proctor.records import Response
from proctor.testing.tokenizer import write_byte_tokenizer
from proctor.worker.alike import unlike
from proctor.worker.assignment import Assignment
from proctor.worker.attempt import Attempt
from proctor.worker.events import Event, read_events
from proctor.worker.shift import Shift

from ..api.conftest import Desk, Room
from .fake_vllm import write_weights

FAKE = Path(__file__).with_name("fake_vllm.py")
MODELS = ("a", "b", "c", "d")
WORDS = ["one", "two", "three"]


def write_model(directory: Path, *, number: int) -> None:
    write_byte_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"vocab_size": 256, "max_position_embeddings": 4096}))
    write_weights(directory, a=b"A%d" % number * 4, b=b"B%d" % number * 4)


@dataclass
class Sweep:
    """Four checkpoints, and one worker that takes them all."""

    root: Path

    @property
    def starts(self) -> list[str]:
        """The checkpoints for which a server was started, in order."""
        return (self.root / "starts").read_text().split()

    def run(self, *, how: str = "right", swap: str = "reload") -> Desk:
        room = Room(self.root)
        task = room.task("t", WORDS, generation={"max_gen_toks": 8, "until": ["\n"]})
        python = self.root / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore "{FAKE}" "$@"\n')
        python.chmod(0o755)
        env = {"FAKE_RELOAD": how, "FAKE_STARTS": str(self.root / "starts")}
        server = {"type": "vllm", "python": str(python), "swap": swap, "env": env}
        config = room.run([{"native": task}], engine={"type": "openai", "server": server})
        text = yaml.safe_load(config.read_text())
        text["models"] = {name: {"path": name} for name in MODELS}
        config.write_text(yaml.safe_dump(text))
        desk = Desk.open(config)
        directory = desk.context.directory
        desk.context.write_configuration()
        directory.write_plan({m.model: m.shards for m in desk.plan().models})
        for target in desk.targets:
            job = target.job(desk.context)
            job.write(directory.jobs / f"{job.job_id}.json")
        jobs = tuple(f"{name}.json" for name in MODELS)
        assignment = Assignment(shape="s", jobs=jobs, costs=(1.0, 0.0, 0.0, 0.0))
        assert asyncio.run(Shift(directory, assignment, Attempt(index=0)).work())
        return desk

    @staticmethod
    def answers(desk: Desk) -> dict[str, dict[str, str]]:
        """What each checkpoint answered, by key."""
        out: dict[str, dict[str, str]] = {}
        for target in desk.targets:
            stored = desk.store.answers(target.weights, target.resolution)
            keys = [i.key for r in desk.recorded.recordings.values() for i in r.instances]
            found = stored.read(keys)
            assert len(found) == len(WORDS)
            out[target.id] = {k: str(a.text) for k, a in found.items() if isinstance(a, Response)}
        return out

    @staticmethod
    def events(desk: Desk, model: str) -> list[Event]:
        (path,) = desk.context.directory.events.glob(f"{model}-*.jsonl")
        return read_events(path)[0]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setenv("PROCTOR_CACHE", str(tmp_path / "cache"))
    for number, name in enumerate(MODELS):
        write_model(tmp_path / name, number=number)
    return Sweep(tmp_path)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What servers of their own answer."""
    other = Sweep(tmp_path_factory.mktemp("other"))
    for number, name in enumerate(MODELS):
        write_model(other.root / name, number=number)
    found = other.answers(other.run(swap="restart"))
    assert other.starts == list(MODELS)
    assert len({tuple(sorted(one.values())) for one in found.values()}) == len(MODELS)
    return found


def nothing_runs() -> bool:
    return not psutil.Process().children(recursive=True)


def test_the_third_checkpoint_and_those_after_it_are_loaded_into_the_seconds_server(
    sweep: Sweep, right: dict[str, dict[str, str]]
) -> None:
    desk = sweep.run()
    assert sweep.starts == ["a", "b"]
    assert sweep.answers(desk) == right
    assert [any(e.reloaded for e in sweep.events(desk, m)) for m in MODELS] == [False, False, True, True]
    assert nothing_runs()
    details = [json.loads(info.details).get("weights") for info in engines(desk)]
    assert details == [None, None, "reloaded", "reloaded"]
    starts = {s.model: (s.starts, s.reloads) for s in api.status(desk.context.config).starts}
    assert starts == {"a": (1, 0), "b": (1, 0), "c": (0, 1), "d": (0, 1)}


def engines(desk: Desk):
    """What answered, for each checkpoint."""
    for target in desk.targets:
        stored = desk.store.answers(target.weights, target.resolution)
        keys = [i.key for r in desk.recorded.recordings.values() for i in r.instances]
        answer = stored.read(keys)[keys[0]]
        assert isinstance(answer, Response)
        yield stored.engines()[answer.engine_id]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nothing", "parameters differ"),
        ("empty", "were not loaded"),
        ("same-path", "parameters differ"),
        ("partly", "were not loaded"),
        ("unseen", "other answers than on a fresh server"),
        ("cache", "other answers than on a fresh server"),
        ("refused", "answers HTTP 500"),
        ("dies", "/collective_rpc"),
    ],
)
def test_a_reload_that_is_not_what_it_says_is_noticed_and_not_tried_again(
    sweep: Sweep, right: dict[str, dict[str, str]], how: str, said: str
) -> None:
    desk = sweep.run(how=how)
    assert sweep.starts == list(MODELS)
    assert sweep.answers(desk) == right
    told = [e.message for m in MODELS for e in sweep.events(desk, m) if "another is started" in e.message]
    assert len(told) == 1 and said in told[0], told
    assert not any(e.reloaded for m in MODELS for e in sweep.events(desk, m))
    assert len(list(desk.context.directory.root.glob("no-reload-*"))) == 1
    assert nothing_runs()


def test_without_being_asked_for_nothing_is_reloaded_and_no_route_is_opened(sweep: Sweep) -> None:
    sweep.run(swap="restart")
    assert sweep.starts == list(MODELS)


def test_a_checkpoint_of_another_shape_gets_a_server_of_its_own(sweep: Sweep) -> None:
    config = sweep.root / "c" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 1.0}))
    desk = sweep.run()
    assert sweep.starts == list(MODELS)
    assert not list(desk.context.directory.root.glob("no-reload-*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: None, None),
        (lambda p: (p / "trainer_state.json").write_text("{}"), None),
        (lambda p: (p / "optimizer.pt").write_bytes(b"x"), None),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "'tokenizer.json' differs"),
        (lambda p: (p / "generation_config.json").write_text("{}"), "'generation_config.json' differs"),
        (lambda p: write_weights(p, a=b"longer than before", b=b"B"), "their tensors differ"),
        (lambda p: write_weights(p, a=b"A0A0A0A0"), "their tensors differ"),
        (lambda p: (p / "pytorch_model.bin").write_bytes(b"x"), "no safetensors file"),
        (lambda p: (p / "model.safetensors").write_bytes(b"x"), "cannot be compared"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 99), "cannot be compared"),
        (lambda p: (p / "model.safetensors").unlink(), "cannot be compared"),
    ],
)
def test_what_must_be_equal_for_a_server_to_be_the_same(sweep: Sweep, change, said: str | None) -> None:
    change(sweep.root / "b")
    found = unlike(str(sweep.root / "a"), str(sweep.root / "b"), {})
    assert (found is None) if said is None else (found is not None and said in found)


def test_what_vllm_builds_from_the_contents_of_weights_is_not_reloaded(sweep: Sweep) -> None:
    for config, tensors in (
        ({"tie_word_embeddings": True}, {"lm_head.weight": b"x"}),
        ({"text_config": {"tie_word_embeddings": True}}, {"model.lm_head.weight": b"x"}),
        ({"quantization_config": {}}, {"a": b"x"}),
    ):
        for name in ("a", "b"):
            (sweep.root / name / "config.json").write_text(json.dumps(config))
            write_weights(sweep.root / name, **tensors)
        assert unlike(str(sweep.root / "a"), str(sweep.root / "b"), {}) is not None
    for args in ({"enable-lora": True}, {"speculative_config": "{}"}, {"quantization": "fp8"}, {"load-format": "x"}):
        write_model(sweep.root / "a", number=0)
        write_model(sweep.root / "b", number=1)
        assert unlike(str(sweep.root / "a"), str(sweep.root / "b"), args) is not None
    assert unlike(str(sweep.root / "a"), str(sweep.root / "b"), {"dtype": "float32"}) is None
