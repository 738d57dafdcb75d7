"""What `prepare` brings, lists and refuses; programs that would need a network are stand-ins."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor import api
from proctor.api.bundling import write_bundle
from proctor.api.context import RunContext
from proctor.api.images import run_settings, with_local_image
from proctor.api.targets import resolve_targets
from proctor.catalog import hub
from proctor.errors import ModelError, ProctorError
from proctor.worker.bundle import BLOCK, Bundle

from .conftest import Room

HOSTILE = "a 'b' \"$(c)\"\nd ü \udcff"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def bundle_of(config: Path) -> Bundle:
    found = Bundle.read(RunContext.open(config).directory.bundle)
    assert found is not None
    return found


def listed(config: Path, kind: str) -> set[str]:
    return {piece.path for piece in bundle_of(config).pieces if piece.kind == kind}


@pytest.fixture
def model(room: Room) -> Path:
    """A model's directory with all that may lie in one."""
    config = room.run([])
    config.unlink()
    model = room.root / "model"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "optimizer.pt", "README.md", ".hidden"):
        (model / name).write_text("{}")
    (model / "pytorch_model.bin").unlink()
    (model / HOSTILE).write_text("x")
    parts = {"weight_map": {"a": "parts/one.safetensors", "b": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(parts))
    for name in (
        *("parts/one.safetensors", "parts/more/code.py", "additional_chat_templates/rag.jinja"),
        *("checkpoint-5/model.safetensors", "global_step5/rank0.pt", "__pycache__/code.py", ".git/hook.py"),
    ):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    return model


def test_all_that_is_read_of_a_model_is_listed_and_nothing_else(room: Room, model: Path) -> None:
    adapter = room.root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"a")
    models = {"m": {"path": "model", "adapters": ["./adapter"], "tokenizer": "./model", "trust_remote_code": True}}
    config = room.run([{"native": room.task("t", ["a"])}], models=models)
    api.prepare(config)
    wanted = ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json", HOSTILE]
    wanted += ["parts/one.safetensors", "parts/more/code.py", "additional_chat_templates/rag.jinja"]
    assert listed(config, "weights") == listed(config, "tokenizer") == {str(model / name) for name in wanted}
    assert listed(config, "adapter") == {str(adapter / "adapter_model.safetensors")}
    bundle_of(config).check("m")
    (model / HOSTILE).write_text("y")
    with pytest.raises(ModelError, match="other contents"):
        bundle_of(config).check("m")


def test_full_checksums_find_any_damage_and_stay_asked_for(room: Room) -> None:
    config = room.run([{"native": room.task("t", ["a"])}], launch={"type": "slurm", "cluster": "generic", "workers": 1})
    weights = room.root / "model" / "pytorch_model.bin"
    weights.write_bytes(os.urandom(5 * BLOCK))

    def damage() -> None:
        with weights.open("r+b") as file:
            file.seek(BLOCK + BLOCK // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))

    api.prepare(config)
    damage()
    bundle_of(config).check("m")
    damage()
    api.prepare(config, full_checksums=True)
    for again in (lambda: None, lambda: api.prepare(config)):
        again()
        assert bundle_of(config).full
        bundle_of(config).check("m")
        damage()
        with pytest.raises(ModelError, match=r"pytorch_model\.bin' is damaged: its SHA-256"):
            bundle_of(config).check("m")
        damage()
    api.prepare(config, full_checksums=False)
    assert not bundle_of(config).full


def test_data_that_marking_needs_is_listed_and_no_workers_business(room: Room) -> None:
    config = room.run([{"native": room.task("t", ["a"])}])
    api.prepare(config)
    assert listed(config, "data") == set()
    context = RunContext.open(config)
    store = context.store(create=False)
    (fingerprint,) = (path.stem for path in (store.path / "requests").glob("*.parquet"))
    store.label_recording(fingerprint, ["dataset"])
    write_bundle(context, store, resolve_targets(context, store), [fingerprint])
    assert listed(config, "data") == {str(room.root / "t.yaml"), str(room.root / "t.jsonl")}
    (room.root / "t.jsonl").unlink()
    bundle_of(config).check("m")


def test_lists_of_earlier_versions_are_read(tmp_path: Path) -> None:
    piece = {"kind": "weights", "path": "/w", "size": 1, "digest": "d", "models": ["m"]}
    (tmp_path / "bundle.json").write_text(json.dumps({"version": 1, "pieces": [piece]}))
    found = Bundle.read(tmp_path / "bundle.json")
    assert found is not None
    assert not found.full


def test_models_and_tokenizers_of_the_hub_are_brought_and_listed(
    room: Room, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    asked: list[tuple[str, str | None, bool]] = []

    def fetch(hub_id: str, revision: str | None = None, *, tokenizer: bool = False) -> Path:
        asked.append((hub_id, revision, tokenizer))
        if hub_id == "org/gone":
            raise ModelError("could not download 'org/gone'")
        repository = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
        snapshot = repository / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / (revision or "main")).write_text(COMMIT)
        for name in ["tokenizer.json", "config.json", *([] if tokenizer else ["model.safetensors"])]:
            (snapshot / name).write_text("{}")
        return snapshot

    monkeypatch.setattr(hub, "fetch_hub", fetch)
    models: dict[str, Any] = {"m": {"path": "org/model", "revision": "v2", "tokenizer": "hub:org/words@v1"}}
    task = room.task("t", ["a"])
    config = room.run([{"native": task}], models=models)
    api.prepare(config)
    assert asked == [("org/model", "v2", False), ("org/words", "v1", True)]
    pieces = {(p.kind, p.source) for p in bundle_of(config).pieces if p.kind != "recording"}
    assert pieces == {("weights", f"org/model@{COMMIT}"), ("tokenizer", f"org/words@{COMMIT}")}
    api.prepare(config)
    assert len(asked) == 2, "what is here is not brought again"
    config = room.run([{"native": [task, "none.yaml"]}], models={"m": {"path": "org/gone"}})
    with pytest.raises(ProctorError) as caught:
        api.prepare(config)
    assert "could not download 'org/gone'" in str(caught.value)
    assert "none.yaml" in str(caught.value)


def test_a_snapshot_without_weights_is_brought_whole(
    room: Room, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--model"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    asked: list[str] = []

    def fetch(hub_id: str, revision: str | None = None, *, tokenizer: bool = False) -> Path:
        asked.append(f"{hub_id} {revision} {tokenizer}")
        (repository / "snapshots" / COMMIT / "model.safetensors").write_bytes(b"x")
        return repository

    monkeypatch.setattr(hub, "fetch_hub", fetch)
    api.prepare(room.run([{"native": room.task("t", ["a"])}], models={"m": {"path": "hub:org/model"}}))
    assert asked == ["org/model None False"]


# --- container images --------------------------------------------------------------------------------

TOOL = """#!/bin/sh
printf '%s\\n' "{name}" "$@" >> "{log}"
[ -n "$FAILS" ] && {{ echo "no route to host" >&2; exit 3; }}
for word do last=$word; done
case "{name} $1" in
  "apptainer pull") printf image > "$2" ;;
  "enroot import") printf image > "$3" ;;
  "podman save") printf image > "$5" ;;
  "ch-convert -o") mkdir "$last" ;;
esac
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Programs that only write down what they are asked; the words of all calls so far."""
    bin, log = tmp_path / "bin", tmp_path / "called"
    bin.mkdir()
    log.touch()
    for name in ("apptainer", "enroot", "podman", "ch-image", "ch-convert"):
        (bin / name).write_text(TOOL.format(name=name, log=log))
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    return lambda: log.read_text().splitlines()


def contained(room: Room, kind: str, image: str, **launch: Any) -> Path:
    (room.root / "clusters.yaml").write_text(
        yaml.safe_dump({"here": {"shared": [str(room.root / "a 'shared' place")]}})
    )
    settings = {"type": "slurm", "cluster": "here", "workers": 1, "container": {"type": kind, "image": image}}
    return room.run([{"native": room.task("t", ["a"])}], launch=settings | launch)


@pytest.mark.parametrize(
    ("kind", "image", "called"),
    [
        ("apptainer", "docker://vllm/vllm-openai:v1", ["apptainer pull"]),
        (
            "enroot",
            "docker://nvcr.io#nvidia/pytorch:1",
            ["enroot import --output", "docker://nvcr.io#nvidia/pytorch:1"],
        ),
        ("pyxis", "nvcr.io#nvidia/pytorch:1", ["enroot import --output", "docker://nvcr.io#nvidia/pytorch:1"]),
        ("podman", "docker.io/vllm/vllm-openai:v1", ["podman pull docker.io", "podman save --format oci-archive"]),
        ("charliecloud", "vllm/vllm-openai:v1", ["ch-image pull vllm", "ch-convert -o dir vllm"]),
    ],
)
def test_an_image_of_a_registry_is_brought_once(
    room: Room, tools: Callable[[], list[str]], kind: str, image: str, called: list[str]
) -> None:
    config = contained(room, kind, image)
    with pytest.raises(ModelError, match="which the nodes cannot reach") as caught:
        shape_of(config)
    assert "proctor prepare" in str(caught.value.hint)
    api.prepare(config)
    api.prepare(config)
    words = " ".join(tools())
    for part in called:
        assert words.count(part) == 1, words
    (file,) = (p for p in (room.root / "a 'shared' place" / "proctor-images").iterdir())
    assert not file.name.startswith(".")
    assert shape_of(config).image == ("oci-archive:" if kind == "podman" else "") + str(file)
    assert listed(config, "container") == (set() if kind == "charliecloud" else {str(file)})


def shape_of(config: Path) -> Any:
    """The container that a job of the run would get."""
    context = RunContext.open(config)
    (settings,) = run_settings(context, os.environ).values()
    return with_local_image(context, settings).container


def test_an_image_that_cannot_be_brought_is_refused_with_what_to_type(
    room: Room, tools: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = contained(room, "apptainer", "docker://a/b:1")
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(ModelError, match=r"apptainer pull could not bring.*status 3\): no route to host") as caught:
        api.prepare(config)
    assert "type yourself: apptainer pull" in str(caught.value.hint)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ModelError, match="apptainer is not here to bring it") as caught:
        api.prepare(config)
    assert "docker://a/b:1" in str(caught.value.hint)
    assert not list((room.root / "a 'shared' place").rglob("*.sif"))


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("apptainer", "/images/a.sif"),
        ("enroot", "created"),
        ("podman", "localhost/mine:1"),
        ("pyxis", "./a.sqsh"),
        ("charliecloud", "/roots/a"),
    ],
)
def test_what_is_no_name_of_a_registry_stays(room: Room, tools: Callable[[], list[str]], kind: str, image: str) -> None:
    config = contained(room, kind, image)
    api.prepare(config)
    assert tools() == []
    assert shape_of(config).image in (image, str(room.root / "a.sqsh"))


def test_nodes_with_a_network_get_the_name(room: Room, tools: Callable[[], list[str]]) -> None:
    config = contained(room, "pyxis", "nvcr.io#nvidia/pytorch:1", offline=False)
    api.prepare(config)
    assert tools() == []
    assert shape_of(config).image == "nvcr.io#nvidia/pytorch:1"
