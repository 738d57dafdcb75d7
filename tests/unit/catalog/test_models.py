"""models: in the configuration, and the entries that they stand for."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proctor.catalog import hub
from proctor.catalog.checkpoints import pattern_regex
from proctor.catalog.models import ModelEntry, ModelKind, base_url, expand_models, fetch_model, missing_models
from proctor.config.spec import RunSpec
from proctor.errors import MissingTool, ModelError, UnknownName

GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)


def expand(**models: dict[str, Any]) -> list[ModelEntry]:
    return expand_models(spec(models))


def spec(models: dict[str, dict[str, Any]]) -> RunSpec:
    return RunSpec.model_validate({"name": "x", "models": models, "tasks": [{"lm_eval": "a"}]})


def weights(directory: Path, name: str = "model.safetensors") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(GGUF if name.endswith(".gguf") else b"weights")
    return directory


@pytest.fixture
def run_of_training(tmp_path: Path) -> Path:
    """checkpoint_0005, checkpoint_0050, checkpoint_0500, checkpoint_5000, and things that do not match."""
    root = tmp_path / "training"
    for step in (5000, 5, 500, 50):
        weights(root / f"checkpoint_{step:04d}")
    (root / "checkpoint_0007").write_text("a file, not a directory")
    weights(root / "checkpoint_0005_old")
    weights(root / "xcheckpoint_0009")
    weights(root / "checkpoint_")
    return root


@pytest.mark.parametrize(
    ("pattern", "name", "step"),
    [
        ("checkpoint_{step}", "checkpoint_0050", "0050"),
        ("checkpoint_{step}", "checkpoint_0050_old", None),
        ("checkpoint_{step}", "my_checkpoint_0050", None),
        ("checkpoint_{step}", "checkpoint_", None),
        ("*-step{step}-*", "run1-step20-bf16", "20"),
        ("*-step{step}*", "run1-step20", "20"),
        ("iter.{step}", "iterx5", None),
        ("iter.{step}", "iter.5", "5"),
        ("a+({step})", "a+(12)", "12"),
        ("c\n{step}", "c\n1", "1"),
        ("{step}", "17\n", None),
        ("{step}", "٣", None),
    ],
)
def test_pattern(pattern: str, name: str, step: str | None) -> None:
    found = pattern_regex(pattern).match(name)
    assert (found["step"] if found else None) == step


def test_checkpoints_are_sorted_by_step_and_keep_their_padding(run_of_training: Path) -> None:
    entries = expand(m={"path": str(run_of_training), "checkpoints": {"pattern": "checkpoint_{step}"}})
    assert [(e.step, e.label) for e in entries] == [
        (5, "checkpoint_0005"),
        (50, "checkpoint_0050"),
        (500, "checkpoint_0500"),
        (5000, "checkpoint_5000"),
    ]
    assert {e.model_key for e in entries} == {"m"} and {e.kind for e in entries} == {ModelKind.DIRECTORY}
    assert entries[0].path == str(run_of_training / "checkpoint_0005")
    assert entries[0].shown == "m checkpoint_0005"


def test_steps_are_numbers_not_texts(tmp_path: Path) -> None:
    for name in ("c10", "c9", "c100", "c009"):
        weights(tmp_path / name)
    entries = expand(m={"path": str(tmp_path), "checkpoints": {"pattern": "c{step}"}})
    assert [e.label for e in entries] == ["c009", "c9", "c10", "c100"]


def test_steps_filter_offset_and_tokens_for_each_raw_step(run_of_training: Path) -> None:
    entries = expand(
        m={
            "path": str(run_of_training),
            "checkpoints": {"pattern": "checkpoint_{step}", "steps": [500, 5], "step_offset": 1000},
            "tokens_trained": ["2B", "1.5M"],
        }
    )
    assert [(e.step, e.label, e.tokens_trained) for e in entries] == [
        (1005, "checkpoint_0005", 1_500_000),
        (1500, "checkpoint_0500", 2_000_000_000),
    ]


def test_tokens_from_the_batch_size_use_the_raw_step(run_of_training: Path) -> None:
    entries = expand(
        m={
            "path": str(run_of_training),
            "checkpoints": {"pattern": "checkpoint_{step}", "steps": [50], "step_offset": 1000},
            "train_batch_size": "2_097_152",
        }
    )
    assert [(e.step, e.tokens_trained) for e in entries] == [(1050, 50 * 2_097_152)]


def test_stated_tokens_win_over_the_batch_size(run_of_training: Path) -> None:
    entries = expand(m={"path": str(weights(run_of_training / "x")), "tokens_trained": "100B", "train_batch_size": 2})
    assert [(e.label, e.step, e.tokens_trained) for e in entries] == [("main", None, 100_000_000_000)]


def test_a_requested_step_that_is_absent_is_an_error(run_of_training: Path) -> None:
    with pytest.raises(ModelError, match=r"models\.m: no checkpoint of .* for step 7, 51; present: 5, 50, 500, 5000"):
        expand(m={"path": str(run_of_training), "checkpoints": {"pattern": "checkpoint_{step}", "steps": [5, 7, 51]}})


def test_of_many_steps_the_nearest_are_listed(tmp_path: Path) -> None:
    for step in range(100):
        weights(tmp_path / f"c{step}")
    with pytest.raises(ModelError, match=r"step 150; present: 88, .*, 99 \(the nearest of 100\)"):
        expand(m={"path": str(tmp_path), "checkpoints": {"pattern": "c{step}", "steps": [150]}})


def test_a_pattern_without_a_match_shows_what_there_is(run_of_training: Path) -> None:
    with pytest.raises(ModelError, match=r"matches the pattern 'chekpoint_\{step\}'; it contains .*'checkpoint_0005'"):
        expand(m={"path": str(run_of_training), "checkpoints": {"pattern": "chekpoint_{step}"}})


def test_a_checkpoint_without_weights_is_an_error(tmp_path: Path) -> None:
    weights(tmp_path / "c1")
    weights(tmp_path / "c2", "training_args.bin")
    with pytest.raises(ModelError, match=r"no weights .* in '.*c2'"):
        expand(m={"path": str(tmp_path), "checkpoints": {"pattern": "c{step}"}})


@pytest.mark.parametrize(
    ("layout", "labels"),
    [
        (["", "hf/a", "b"], ["main"]),
        (["hf/step2", "hf/step1", "b"], ["step1", "step2"]),
        (["b", "a"], ["a", "b"]),
        (["b", "a/hf/two", "a/hf/one", "c/other/deep"], ["a/one", "a/two", "b"]),
    ],
)
def test_discovery(layout: list[str], labels: list[str], tmp_path: Path) -> None:
    for place in layout:
        weights(tmp_path / place)
    (tmp_path / "empty").mkdir(exist_ok=True)
    entries = expand(m={"path": str(tmp_path), "checkpoints": {"discover": True}})
    assert [e.label for e in entries] == labels


def test_weights_further_down_are_not_taken_unasked(tmp_path: Path) -> None:
    weights(tmp_path / "a")
    with pytest.raises(ModelError, match="but in 1 directory below it") as caught:
        expand(m={"path": str(tmp_path)})
    assert caught.value.hint and "discover: true" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no weights") as caught:
        expand(m={"path": str(tmp_path / "empty")})
    assert caught.value.hint is None


def test_only_a_duplicate_model_and_label_is_a_duplicate(tmp_path: Path) -> None:
    for name in ("s1", "s2"):
        weights(tmp_path / "one" / name)
        weights(tmp_path / "two" / name.replace("2", "3"))
    pattern = {"pattern": "s{step}"}
    one = {"path": str(tmp_path / "one"), "checkpoints": pattern | {"steps": [2]}, "model_key": "k"}
    two = {"path": str(tmp_path / "two"), "checkpoints": pattern, "model_key": "k"}
    entries = expand(one=one, two=two)
    assert [(e.name, e.label) for e in entries] == [("one", "s2"), ("two", "s1"), ("two", "s3")]
    with pytest.raises(ModelError, match=r"models\.one and models\.two are both 'k' at 's1'"):
        expand(one=one | {"checkpoints": pattern}, two=two)


def test_gguf_files(tmp_path: Path) -> None:
    weights(tmp_path, "a.gguf")
    entries = expand(file={"path": str(tmp_path / "a.gguf")}, directory={"path": str(tmp_path)})
    assert [(e.kind, e.path) for e in entries] == [(ModelKind.GGUF, str(tmp_path / "a.gguf"))] * 2
    weights(tmp_path, "b.gguf")
    with pytest.raises(ModelError, match=r"holds 2 GGUF models: 'a\.gguf', 'b\.gguf'"):
        expand(directory={"path": str(tmp_path)})


def test_a_split_gguf_is_one_model(tmp_path: Path) -> None:
    for i in (2, 1, 3):
        weights(tmp_path, f"m-{i:05d}-of-00003.gguf")
    (entry,) = expand(m={"path": str(tmp_path)})
    assert entry.path.endswith("m-00001-of-00003.gguf")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.gguf", b"<html>", "is not a GGUF file: it begins with b'<htm'"),
        ("m.gguf", b"", "is not a GGUF file"),
        ("m.safetensors", b"weights", "is a file, but not a GGUF model"),
    ],
)
def test_files_that_are_no_model(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=expected):
        expand(m={"path": str(tmp_path / name)})


def test_a_missing_path_names_its_nearest_sibling(tmp_path: Path) -> None:
    weights(tmp_path / "llama-1b")
    with pytest.raises(ModelError, match=r"no such file or directory: .*; did you mean '.*/llama-1b'"):
        expand(m={"path": str(tmp_path / "lama-1b")})
    with pytest.raises(ModelError, match=r"did you mean '.*/llama-1b'"):
        expand(m={"path": str(tmp_path / "llama-1bb" / "checkpoint")})
    with pytest.raises(ModelError, match="no such tokenizer"):
        expand(m={"path": str(tmp_path / "llama-1b"), "tokenizer": str(tmp_path / "none")})
    with pytest.raises(ModelError, match=r"the adapter .* holds no weights"):
        expand(m={"path": str(tmp_path / "llama-1b"), "adapters": str(tmp_path)})


def test_hostile_paths(tmp_path: Path, hostile_name: str) -> None:
    root = tmp_path / hostile_name
    weights(root / f"{hostile_name}7")
    literal = hostile_name.replace("*", "")
    entries = expand(
        **{hostile_name: {"path": str(root), "checkpoints": {"pattern": literal + "{step}"}}},
    )
    assert [(e.name, e.step, e.label) for e in entries] == [(hostile_name, 7, f"{hostile_name}7")]


def test_endpoint() -> None:
    model = {
        "path": "http://one:8000/v1/",
        "urls": ["http://two:8000/", "http://one:8000"],
        "served_model": "llama",
        "revision": "r1",
        "api_key_env": "KEY",
    }
    (entry,) = expand(m=model)
    assert entry.kind is ModelKind.ENDPOINT
    assert entry.urls == ("http://one:8000", "http://two:8000") and entry.path == "http://one:8000"
    assert (entry.served_model, entry.revision, entry.api_key_env) == ("llama", "r1", "KEY")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h/v1", "http://h"),
        ("http://h//", "http://h"),
        ("http://h/a/v1/", "http://h/a"),
        ("http://h/v12", "http://h/v12"),
    ],
)
def test_base_url(url: str, expected: str) -> None:
    assert base_url(url) == expected


def test_embedded_model_that_does_not_exist() -> None:
    with pytest.raises(UnknownName, match="did you mean 'smollm2-135m'"):
        expand(m={"path": "embedded:smollm2-135"})


# --- the hub's cache ------------------------------------------------------------------------------

COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A hub cache; adds a repository with two commits, main and v1 pointing to the second and first."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(hub_id: str) -> Path:
        repository = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        for name, commit in (("main", COMMITS[1]), ("v1", COMMITS[0])):
            (repository / "refs" / name).write_text(commit)
            weights(repository / "snapshots" / commit)
        return repository

    return add


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, COMMITS[1]), ("main", COMMITS[1]), ("v1", COMMITS[0]), ("1" * 40, COMMITS[0]), ("1" * 7, COMMITS[0])],
)
def test_hub_id_from_the_cache(revision: str | None, commit: str, hub_cache: Callable[[str], Path]) -> None:
    repository = hub_cache("org/name")
    (entry,) = expand(m={"path": "hub:org/name", "revision": revision})
    assert entry.kind is ModelKind.HUB and entry.revision == commit
    assert entry.path == str(repository / "snapshots" / commit)


def test_a_hub_repository_of_one_gguf_file_is_that_file(hub_cache: Callable[[str], Path]) -> None:
    repository = hub_cache("org/quantised")
    snapshot = repository / "snapshots" / COMMITS[1]
    (snapshot / "model.safetensors").unlink()
    weights(snapshot, "m.Q4.gguf")
    (entry,) = expand(m={"path": "hub:org/quantised"})
    assert (entry.kind, entry.path) == (ModelKind.GGUF, str(snapshot / "m.Q4.gguf"))
    assert entry.revision == COMMITS[1]


def test_hub_id_that_is_not_cached(hub_cache: Callable[[str], Path]) -> None:
    hub_cache("org/name")
    with pytest.raises(ModelError, match=r"neither a local path nor in the hub cache.*'org/name'") as caught:
        expand(m={"path": "org/nam"})
    assert caught.value.hint and "proctor models --fetch org/nam" in caught.value.hint
    with pytest.raises(ModelError, match="at revision 'v2'; the cache has 'main', 'v1'"):
        expand(m={"path": "hub:org/name", "revision": "v2"})
    wanted = spec(
        {
            "a": {"path": "hub:org/name"},
            "b": {"path": "org/x", "revision": "v3"},
            "c": {"path": "embedded:smollm2-135m"},
        }
    )
    assert missing_models(wanted)[:1] == ["org/x@v3"]


def test_hub_cache_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert hub.hub_cache() == Path("/c/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/h")
    assert hub.hub_cache() == Path("/h/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/x")
    assert hub.hub_cache() == Path("/x")


def test_fetch_without_the_hub_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingTool, match="huggingface-hub"):
        fetch_model("org/name")


@pytest.mark.parametrize("path", ["/" + "x" * 300, "/proc/self/environ/x", "./a\nb.gguf"])
def test_paths_that_no_file_can_have(path: str) -> None:
    with pytest.raises(ModelError, match="no such file or directory"):
        expand(m={"path": path})
