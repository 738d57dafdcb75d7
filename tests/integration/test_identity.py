"""Two models never mix, and one is never asked twice; the evidence is the number of requests that the server got."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor.config.spec import EndpointServer
from proctor.infer.fake_model import BEGIN
from proctor.testing import prompt_digest, write_byte_tokenizer

from .conftest import Lab, start_server, write_model

WORDS = [f"w{i}" for i in range(4)]
SAMPLED = {"temperature": 0.8, "do_sample": True}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def change(config: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Edit a configuration in place."""
    run = yaml.safe_load(config.read_text())
    edit(run)
    config.write_text(yaml.safe_dump(run))
    return config


def config_for(lab: Lab, models: dict[str, Path], *, tasks: list[Path] | None = None, **more: Any) -> Path:
    """One run of these model directories over four words."""
    tasks = tasks or [lab.write_task("words", WORDS)]
    return lab.write_run(tasks=tasks, models={name: {"path": str(path)} for name, path in models.items()}, **more)


def requests_of(lab: Lab, config: Path) -> int:
    """How many requests one more `proctor run` sends."""
    before = sum(lab.asked().values())
    lab.run("run", str(config))
    return sum(lab.asked().values()) - before


def flip_byte(path: Path) -> None:
    """Change one byte of one tensor in place: same inode, same size."""
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        old = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([old[0] ^ 1]))


# --- weights ---


def test_same_name_other_weights(lab: Lab) -> None:
    zeros = write_model(lab.root / "zeros")
    ones = write_model(lab.root / "ones", weights=b"\1" * 16)
    assert requests_of(lab, config_for(lab, {"same": zeros})) == len(WORDS)
    assert requests_of(lab, config_for(lab, {"same": ones})) == len(WORDS)
    assert requests_of(lab, config_for(lab, {"same": zeros})) == 0


@pytest.mark.parametrize("times", ["as they come", "put back"])
def test_one_byte_changed_in_place(lab: Lab, times: str) -> None:
    model = write_model(lab.root / "model")
    config = config_for(lab, {"m": model})
    assert requests_of(lab, config) == len(WORDS)
    assert requests_of(lab, config) == 0
    weights = model / "model.safetensors"
    before = weights.stat()
    flip_byte(weights)
    if times == "put back":
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert (after.st_mtime_ns == before.st_mtime_ns) == (times == "put back")
    assert requests_of(lab, config) == len(WORDS)
    flip_byte(weights)
    assert requests_of(lab, config) == 0  # the old weights are back, and so are their answers


@pytest.mark.parametrize("how", ["copy", "symlinked directory", "symlinked files", "hard links", "moved"])
def test_two_paths_one_model(lab: Lab, how: str) -> None:
    first = write_model(lab.root / "first")
    assert requests_of(lab, config_for(lab, {"one": first})) == len(WORDS)
    second = lab.root / "a second place"
    if how == "copy":
        shutil.copytree(first, second)
    elif how == "symlinked directory":
        second.symlink_to(first)
    elif how == "moved":
        first.rename(second)
    else:
        second.mkdir()
        for file in first.iterdir():
            link = second / file.name
            link.symlink_to(file) if how == "symlinked files" else link.hardlink_to(file)
    other = config_for(lab, {"another": second}, name="other")
    assert requests_of(lab, other) == 0
    assert lab.scores(other) == [("words", "exact_match", 0.0, 4), ("words", "contains", 0.0, 4)]


def test_two_names_of_one_model_in_one_run(lab: Lab) -> None:
    first = write_model(lab.root / "first")
    shutil.copytree(first, lab.root / "second")
    both = config_for(lab, {"one": first, "two": lab.root / "second"}, launch={"max_workers": 2})
    assert requests_of(lab, both) == len(WORDS)


def test_another_command_is_another_model(lab: Lab) -> None:
    config = config_for(lab, {"m": write_model(lab.root / "model")})
    assert requests_of(lab, config) == len(WORDS)
    change(config, lambda run: run["engine"]["server"]["argv"].extend(["--weights", "float16"]))
    assert requests_of(lab, config) == len(WORDS)


def test_numerics_are_another_model_and_speed_is_not(lab: Lab) -> None:
    model = str(write_model(lab.root / "model"))
    servers = {
        "plain": {"args": {"dtype": "float32"}},
        "same": {"args": {"dtype": "torch.float32", "max-num-seqs": 4}, "replicas": 2},
        "half": {"args": {"dtype": "bfloat16"}},
        "cache": {"args": {"dtype": "float32", "kv-cache-dtype": "fp8"}},
    }
    models = {
        name: {"path": model, "model_key": name, "engine": {"server": {"type": "vllm"} | server}}
        for name, server in servers.items()
    }
    config = lab.write_run(tasks=[lab.write_task("words", WORDS)], models=models, engine={"type": "openai"})
    planned = json.loads(lab.run("plan", str(config), "--json").stdout)["models"]
    weights = {m["model"]: m["weights"] for m in planned}
    assert weights["plain"] == weights["same"]
    assert len(set(weights.values())) == 3


# --- endpoints ---


@pytest.fixture
def endpoint(lab: Lab) -> Iterator[str]:
    """A server that runs already."""
    with start_server(lab) as url:
        yield url


def endpoint_config(lab: Lab, url: str, **model: Any) -> Path:
    return lab.write_run(
        tasks=[lab.write_task("words", WORDS)],
        models={"m": {"path": url, "served_model": "default", "revision": "2026-01", **model}},
        engine={"type": "openai", "server": {"type": EndpointServer().type}},
    )


def test_declared_revision(lab: Lab, endpoint: str) -> None:
    assert requests_of(lab, endpoint_config(lab, endpoint)) == len(WORDS)
    assert requests_of(lab, endpoint_config(lab, endpoint)) == 0
    assert requests_of(lab, endpoint_config(lab, endpoint, revision="2026-02")) == len(WORDS)
    assert requests_of(lab, endpoint_config(lab, endpoint, revision="2026-01")) == 0


def test_declared_name_is_the_model_and_the_url_is_not(lab: Lab, endpoint: str) -> None:
    assert requests_of(lab, endpoint_config(lab, endpoint)) == len(WORDS)
    same_server = endpoint.replace("127.0.0.1", "localhost")
    assert requests_of(lab, endpoint_config(lab, same_server)) == 0
    lab.server_flags = ["--served-model", "other"]
    with start_server(lab) as other:
        assert requests_of(lab, endpoint_config(lab, other, served_model="other")) == len(WORDS)


# --- generation_config.json ---

PENALTY = {"repetition_penalty": 1.5, "temperature": 0.6, "top_p": 0.7, "top_k": 20}
NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": [0, -1],
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def sent(lab: Lab) -> list[dict[str, Any]]:
    """The bodies that the server got."""
    path = lab.root / "bodies.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_generation_config_is_overridden_over_http(lab: Lab) -> None:
    lab.server_flags = ["--bodies", str(lab.root / "bodies.jsonl"), "--defaults", "{" + json.dumps(PENALTY) + "}"]
    plain = write_model(lab.root / "plain")
    penalised = write_model(lab.root / "penalised", generation_config=PENALTY)
    assert requests_of(lab, config_for(lab, {"m": penalised})) == len(WORDS)
    bodies = sent(lab)
    assert len(bodies) == len(WORDS)
    for body in bodies:
        for name, value in NEUTRAL.items():
            assert name in body, f"{name} is left to the server, whose default is the model's own"
            assert body[name] in value if isinstance(value, list) else body[name] == value, name
    # So the file decides nothing, and the same weights without it share the answers.
    assert requests_of(lab, config_for(lab, {"m": plain})) == 0


def test_generation_config_counts_where_it_is_obeyed(lab: Lab) -> None:
    lab.server_flags = ["--bodies", str(lab.root / "bodies.jsonl")]
    plain = write_model(lab.root / "plain")
    penalised = write_model(lab.root / "penalised", generation_config=PENALTY)
    engine = {"type": "openai", "server": lab.server(), "profile": "hf"}
    assert requests_of(lab, config_for(lab, {"m": plain}, engine=engine)) == len(WORDS)
    assert {b["repetition_penalty"] for b in sent(lab)} == {1.0}
    assert requests_of(lab, config_for(lab, {"m": penalised}, engine=engine)) == len(WORDS)
    assert {b["repetition_penalty"] for b in sent(lab)[len(WORDS) :]} == {1.5}


def test_generation_config_counts_for_lm_eval_model_classes(lab: Lab) -> None:
    plain = write_model(lab.root / "plain")
    penalised = write_model(lab.root / "penalised", generation_config=PENALTY)
    copied = lab.root / "copied"
    shutil.copytree(plain, copied)
    config = config_for(
        lab, {"plain": plain, "penalised": penalised, "copied": copied}, engine={"type": "lm_eval", "model": "hf"}
    )
    models = json.loads(lab.run("plan", str(config), "--json").stdout)["models"]
    stored = {m["model"]: (m["weights"], m["resolution"]) for m in models}
    assert stored["plain"] != stored["penalised"]
    assert stored["plain"] == stored["copied"]


# --- how text becomes tokens ---


def test_another_tokenizer(lab: Lab) -> None:
    model = write_model(lab.root / "model")
    config = config_for(lab, {"m": model}, engine={"type": "openai", "server": lab.server(), "profile": "hf"})
    assert requests_of(lab, config) == len(WORDS)
    write_byte_tokenizer(model, add_bos=True)
    assert requests_of(lab, config) == len(WORDS)
    with_bos = prompt_digest([BEGIN, *b"Say w0:"])
    assert lab.asked()[with_bos] == 1
    assert lab.asked()[lab.digest("w0")] == 1


def test_another_chat_template(lab: Lab) -> None:
    model = write_model(lab.root / "model")
    task = lab.write_task("words", WORDS)
    chat = lab.write_run(tasks=[task], name="chat", models={"m": {"path": str(model)}})
    change(chat, lambda run: run["tasks"][0].update(apply_chat_template=True))
    plain = lab.write_run(tasks=[task], name="plain", models={"m": {"path": str(model)}})
    assert requests_of(lab, chat) == len(WORDS)
    assert requests_of(lab, plain) == len(WORDS)
    write_byte_tokenizer(model, chat_template="{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    assert requests_of(lab, chat) == len(WORDS)
    assert requests_of(lab, plain) == 0, "a prompt that goes through no template is the same prompt"


# --- sampling ---


def sampled_task(lab: Lab) -> Path:
    path = lab.write_task("sampled", WORDS)
    task = yaml.safe_load(path.read_text())
    task["generation"] |= SAMPLED
    path.write_text(yaml.safe_dump(task))
    return path


def test_replicate_asks_what_is_sampled_and_nothing_else(lab: Lab) -> None:
    choice = lab.write_task("choice", ["c0", "c1"], output="multiple_choice")
    greedy = lab.write_task("greedy", ["g0", "g1"])
    config = config_for(lab, {"m": write_model(lab.root / "model")}, tasks=[sampled_task(lab), greedy, choice])
    lab.run("run", str(config))
    first = lab.asked()
    change(config, lambda run: run["tasks"][0].update(replicate=1))
    lab.run("run", str(config))
    again = lab.asked() - first
    assert again == {lab.digest(w): 1 for w in WORDS}
    change(config, lambda run: run["tasks"][0].update(replicate=0))
    assert requests_of(lab, config) == 0


def test_more_repeats_extend_fewer(lab: Lab) -> None:
    config = config_for(lab, {"m": write_model(lab.root / "model")}, tasks=[sampled_task(lab)])
    counts: list[int] = []
    for repeats in (2, 5, 5, 1):
        change(config, lambda run, n=repeats: run["tasks"][0].update(repeats=n))
        counts.append(requests_of(lab, config))
    assert counts == [2 * len(WORDS), 3 * len(WORDS), 0, 0]


def test_repeats_of_a_greedy_request_are_one_question(lab: Lab) -> None:
    config = config_for(lab, {"m": write_model(lab.root / "model")})
    change(config, lambda run: run["tasks"][0].update(repeats=3))
    assert requests_of(lab, config) == len(WORDS)


def test_another_seed_is_another_sample(lab: Lab) -> None:
    config = config_for(lab, {"m": write_model(lab.root / "model")}, tasks=[sampled_task(lab)])
    assert requests_of(lab, config) == len(WORDS)
    change(config, lambda run: run["engine"].update(seed=7))
    assert requests_of(lab, config) == len(WORDS)
