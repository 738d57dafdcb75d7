"""Two models never mix; one model under two paths is one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proctor.catalog import digests
from proctor.catalog.gguf import read_gguf
from proctor.catalog.models import ModelEntry, ModelKind
from proctor.catalog.weights import Weights, identify, max_length
from proctor.errors import ModelError
from proctor.records import canonical_json, digest

VLLM = {"engine": "vllm"}
HF = {"engine": "lm_eval:hf"}
TENSOR = bytes(range(256)) * 64


def entry(path: Path, kind: ModelKind = ModelKind.DIRECTORY, **rest: Any) -> ModelEntry:
    return ModelEntry(
        name="m", display_name="m", model_key="m", label="main", step=None, kind=kind, path=str(path), source="", **rest
    )


def fingerprint(path: Path, numerics: dict[str, Any] = VLLM, **rest: Any) -> str:
    return identify(entry(path, **rest), numerics=numerics).fingerprint


def safetensors(path: Path, tensor: bytes = TENSOR) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [len(tensor) // 4], "data_offsets": [0, len(tensor)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + tensor)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    safetensors(directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 2048}))
    (directory / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ a }}"}))
    (directory / "README.md").write_text("hello")
    return directory


def flip(path: Path, at: int) -> None:
    """Change one byte in place, and put the modification time back."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(at)
        old = stream.read(1)
        stream.seek(at)
        stream.write(bytes([old[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("position", [-1, -len(TENSOR) // 2, -len(TENSOR)])
def test_one_byte_of_one_tensor(model: Path, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", -1)  # keep digests at once
    first = fingerprint(model)
    assert fingerprint(model) == first
    flip(model / "model.safetensors", (model / "model.safetensors").stat().st_size + position)
    assert fingerprint(model) != first
    flip(model / "model.safetensors", (model / "model.safetensors").stat().st_size + position)
    assert fingerprint(model) == first


def test_the_path_does_not_count(model: Path, tmp_path: Path, hostile_name: str) -> None:
    copy, link, files = (tmp_path / f"{hostile_name} {x}" for x in ("copy", "link", "files"))
    shutil.copytree(model, copy)
    link.symlink_to(model, target_is_directory=True)
    files.mkdir()
    for file in model.iterdir():
        (files / file.name).symlink_to(file)
    assert {fingerprint(path) for path in (copy, link, files)} == {fingerprint(model)}


def add(name: str, content: str = "x") -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(content)


COUNTS: dict[str, Callable[[Path], object]] = {
    "config": add("config.json", '{"rope_theta": 1}'),
    "another weight file": add("model-2.safetensors"),
    "pytorch weights": add("pytorch_model.bin"),
    "quantisation": add("quantize_config.json", "{}"),
    "another name of the same bytes": lambda model: (model / "model.safetensors").rename(model / "other.safetensors"),
    "adapter beside the weights": add("adapter_model.safetensors"),
}
DOES_NOT_COUNT: dict[str, Callable[[Path], object]] = {
    "readme": add("README.md", "bye"),
    "optimizer": add("optimizer.bin"),
    "training arguments": add("training_args.bin"),
    "generation config, over HTTP": add("generation_config.json", '{"repetition_penalty": 1.2}'),
    "tokenizer, which has its own digest": add("tokenizer.json", "{}"),
    "code that no config names": add("eval.py"),
}


@pytest.mark.parametrize("what", COUNTS)
def test_counts(what: str, model: Path) -> None:
    first = fingerprint(model)
    COUNTS[what](model)
    assert fingerprint(model) != first


@pytest.mark.parametrize("what", DOES_NOT_COUNT)
def test_does_not_count(what: str, model: Path) -> None:
    first = fingerprint(model)
    DOES_NOT_COUNT[what](model)
    assert fingerprint(model) == first


def test_generation_config_counts_where_the_engine_applies_it(model: Path) -> None:
    config = model / "generation_config.json"
    plain = fingerprint(model, HF)
    config.write_text('{"repetition_penalty": 1.2}')
    penalised = fingerprint(model, HF)
    config.write_text('{"repetition_penalty": 1.3}')
    assert len({plain, penalised, fingerprint(model, HF)}) == 3
    assert len({fingerprint(model, {"engine": e}) for e in ("vllm", "sglang", "llama.cpp")}) == 3


def test_numerics_count(model: Path) -> None:
    chosen = [VLLM, VLLM | {"dtype": "float32"}, VLLM | {"quantization": "fp8"}, VLLM | {"kv-cache-dtype": "fp8"}, HF]
    assert len({fingerprint(model, numerics) for numerics in chosen}) == len(chosen)


def test_custom_code_counts_if_it_is_run(model: Path) -> None:
    (model / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}}')
    (model / "modeling.py").write_text("one")
    ignored, first = fingerprint(model), fingerprint(model, trust_remote_code=True)
    (model / "modeling.py").write_text("two")
    assert fingerprint(model) == ignored
    assert len({ignored, first, fingerprint(model, trust_remote_code=True)}) == 3


def test_adapters_count_in_order(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        safetensors(tmp_path / name / "adapter_model.safetensors", name.encode() * 64)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    prints = [fingerprint(model, adapters=adapters) for adapters in ((), (a,), (b,), (a, b), (b, a))]
    assert len(set(prints)) == 5
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert fingerprint(model, adapters=(str(tmp_path / "c"),)) == prints[1]
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": 8}')
    assert fingerprint(model, adapters=(a,)) != prints[1]


def test_shards_come_from_the_index_and_must_be_there(model: Path) -> None:
    (model / "model.safetensors").unlink()
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        safetensors(model / name, bytes([i]) * 64)
    index = {"weight_map": {"a": names[0], "b": names[1], "c": names[1]}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = identify(entry(model), numerics=VLLM)
    assert set(json.loads(weights.identity)["files"]) == {"config.json", "model.safetensors.index.json", *names}
    (model / names[1]).unlink()
    with pytest.raises(ModelError, match=r"is incomplete: .* names 1 file\(s\) that are not there, first 'model-00002"):
        fingerprint(model)


def test_an_index_left_over_from_another_format_is_no_harm(model: Path) -> None:
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert len(fingerprint(model)) == 64


def test_the_identity_says_what_it_is_made_of(model: Path) -> None:
    weights = identify(entry(model), numerics=VLLM)
    identity = json.loads(weights.identity)
    content = (model / "model.safetensors").read_bytes()
    assert identity["files"]["model.safetensors"] == hashlib.sha256(content).hexdigest()
    assert weights.identity == canonical_json(identity) and digest(identity) == weights.fingerprint
    assert str(model) not in weights.identity


def test_endpoint_is_its_name_and_revision_not_its_url() -> None:
    def endpoint(url: str, served_model: str, revision: str | None) -> str:
        return fingerprint(
            Path(url), {"engine": "endpoint"}, kind=ModelKind.ENDPOINT, served_model=served_model, revision=revision
        )

    first = endpoint("http://one", "llama", "r1")
    assert endpoint("http://two", "llama", "r1") == first
    assert len({first, endpoint("http://one", "llama", "r2"), endpoint("http://one", "llama", None)}) == 3
    assert endpoint("http://one", "qwen", "r1") != first


def test_tokenizer_and_template_have_digests_of_their_own(model: Path, tmp_path: Path) -> None:
    def both(path: Path = model, **rest: Any) -> Weights:
        return identify(entry(path, **rest), numerics=VLLM)

    first = both()
    assert first.tokenizer_digest and first.template_digest
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ b }}", "name_or_path": "/somewhere"}))
    second = both()
    assert second.tokenizer_digest == first.tokenizer_digest and second.template_digest != first.template_digest
    (model / "chat_template.jinja").write_text("{{ b }}")
    third = both()
    config.write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ ignored }}"}))
    assert both().template_digest == third.template_digest
    config.write_text(json.dumps({"bos_token": "<x>"}))
    assert both().tokenizer_digest != first.tokenizer_digest
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.model").write_bytes(b"x")
    other = both(tokenizer=str(tmp_path / "other"))
    assert other.tokenizer_digest != both().tokenizer_digest and other.template_digest is None
    assert other.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"max_position_embeddings": 4096, "n_ctx": 5}, {}, 4096),
        ({"n_positions": 1024, "max_position_embeddings": 4096}, {}, 1024),
        ({"n_ctx": 512}, {"model_max_length": 9}, 512),
        ({"max_position_embeddings": 1200, "text_config": {"max_position_embeddings": 32768}}, {}, 32768),
        ({"n_ctx": 512, "text_config": {"x": 1}}, {"model_max_length": 9}, 9),
        ({"seq_length": 777}, {"model_max_length": 1024}, 1024),
        ({"seq_length": 777}, {"model_max_length": 1000000000000000019884624838656}, None),
        ({"model_type": "rwkv", "context_length": 300}, {}, 300),
        ({"context_length": 300}, {}, None),
        ({"max_position_embeddings": None}, {"model_max_length": 8}, 8),
    ],
)
def test_max_length(config: dict[str, Any], tokenizer: dict[str, Any], expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert max_length(tmp_path) == expected


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("tokenizer_config.json", "[]")])
def test_damaged_json_is_named(name: str, text: str, model: Path) -> None:
    (model / name).write_text(text)
    with pytest.raises(ModelError, match=name):
        fingerprint(model)


# --- the hub's cache ------------------------------------------------------------------------------


def test_hub_blobs_bring_their_hash_and_equal_a_local_copy(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        name = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
        (repository / "blobs" / name).write_bytes(content)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", name))
    read: list[str] = []
    original = hashlib.file_digest

    def spy(stream: Any, name: str) -> Any:
        read.append(os.path.basename(stream.name))
        return original(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", spy)
    hub = fingerprint(snapshot, kind=ModelKind.HUB, revision="1" * 40)
    assert "model.safetensors" not in read and "config.json" in read
    assert hub == fingerprint(model)
    assert "model.safetensors" in read


# --- GGUF -----------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def strings(*values: str) -> bytes:
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


def gguf(*pairs: bytes, tensor: bytes = TENSOR, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 1, len(pairs)) + b"".join(pairs) + tensor


PAIRS = (
    pair("general.architecture", 8, text("llama")),
    pair("llama.context_length", 4, struct.pack("<I", 8192)),
    pair("a.float", 12, struct.pack("<d", 0.5)),
    pair("a.flag", 7, b"\x01"),
    pair("nested", 9, struct.pack("<IQ", 9, 2) + strings("a", "b") + struct.pack("<IQ", 0, 3) + b"xyz"),
    pair("tokenizer.ggml.tokens", 9, strings("<s>", "ünï", "")),
    pair("tokenizer.chat_template", 8, text("{{ m }}")),
    pair("tokenizer.ggml.add_bos_token", 7, b"\x00"),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(*PAIRS))
    return path


def test_gguf_metadata(file: Path) -> None:
    metadata = read_gguf(file)
    assert metadata.context_length == 8192
    assert metadata.scalars["a.float"] == 0.5 and metadata.scalars["a.flag"] is True
    assert metadata.chat_templates == {"tokenizer.chat_template": "{{ m }}"}
    assert "tokenizer.ggml.tokens" not in metadata.scalars


def test_gguf_weights(file: Path, tmp_path: Path) -> None:
    def weights(path: Path) -> Weights:
        return identify(entry(path, ModelKind.GGUF), numerics={"engine": "llama.cpp"})

    first = weights(file)
    assert first.max_length == 8192 and first.tokenizer_digest and first.template_digest
    other_name = tmp_path / "other name.gguf"
    shutil.copy(file, other_name)
    assert weights(other_name) == first
    flip(other_name, other_name.stat().st_size - 1)
    flipped = weights(other_name)
    assert flipped.fingerprint != first.fingerprint and flipped.tokenizer_digest == first.tokenizer_digest
    other_name.write_bytes(gguf(*PAIRS[:5], pair("tokenizer.ggml.tokens", 9, strings("<s>", "x", "")), *PAIRS[6:]))
    assert weights(other_name).tokenizer_digest != first.tokenizer_digest
    assert weights(other_name).template_digest == first.template_digest


def test_every_part_of_a_split_gguf_counts(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(gguf(*PAIRS))
    first = fingerprint(parts[0], kind=ModelKind.GGUF)
    flip(parts[1], parts[1].stat().st_size - 1)
    assert fingerprint(parts[0], kind=ModelKind.GGUF) != first
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"one of 2 parts, but 'm-00002-of-00002\.gguf' is not there"):
        fingerprint(parts[0], kind=ModelKind.GGUF)


def damaged() -> Iterator[tuple[str, bytes]]:
    whole = gguf(*PAIRS, tensor=b"")
    yield "another magic", b"GGML" + whole[4:]
    yield "empty", b""
    yield "unknown version", gguf(version=1)
    yield "big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    yield "unknown type", gguf(pair("x", 99, b""))
    yield "a text of 2^63 bytes", gguf(pair("x", 8, struct.pack("<Q", 2**63)))
    yield "an array of 2^63 elements", gguf(pair("x", 9, struct.pack("<IQ", 8, 2**63)))
    yield "too many entries", b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62)
    for cut in range(4, len(whole), 7):
        yield f"cut at {cut}", whole[:cut]


@pytest.mark.parametrize(("what", "content"), list(damaged()), ids=[what for what, _ in damaged()])
def test_damaged_gguf(what: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.gguf"):
        read_gguf(path)


# --- the cache of digests -------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were really read."""
    names: list[str] = []
    original = hashlib.file_digest

    def spy(stream: Any, name: str) -> Any:
        names.append(os.path.basename(stream.name))
        return original(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", spy)
    return names


def test_a_file_is_read_once(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    path = tmp_path / "w.safetensors"
    path.write_bytes(TENSOR)
    (tmp_path / "link.safetensors").symlink_to(path)
    expected = hashlib.sha256(TENSOR).hexdigest()
    assert digests.file_digest(path) == digests.file_digest(tmp_path / "link.safetensors") == expected
    path.rename(tmp_path / "renamed.safetensors")
    os.utime(tmp_path / "renamed.safetensors", ns=(0, 0))
    assert digests.file_digest(tmp_path / "renamed.safetensors") == expected
    assert reads == ["w.safetensors", "renamed.safetensors"]


def test_a_file_that_was_just_written_is_not_kept(tmp_path: Path, reads: list[str]) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(TENSOR)
    digests.file_digest(path)
    digests.file_digest(path)
    assert len(reads) == 2


def test_a_damaged_or_unwritable_cache_only_costs_time(
    tmp_path: Path, reads: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", -1)
    path = tmp_path / "w.safetensors"
    path.write_bytes(TENSOR)
    expected = digests.file_digest(path)
    (kept,) = (p for p in (own_cache / "digests").rglob("*") if p.is_file())
    kept.write_text(expected[:-1])
    assert digests.file_digest(path) == expected and len(reads) == 2
    shutil.rmtree(own_cache)
    own_cache.write_text("not a directory")
    assert digests.file_digest(path) == expected and len(reads) == 3


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(TENSOR)
    original = hashlib.file_digest

    def append(stream: Any, name: str) -> Any:
        out = original(stream, name)
        with path.open("ab") as more:
            more.write(b"x")
        return out

    monkeypatch.setattr(hashlib, "file_digest", append)
    with pytest.raises(ModelError, match="changed while it was read"):
        digests.file_digest(path)
    with pytest.raises(ModelError, match=r"cannot read .*none"):
        digests.file_digest(tmp_path / "none")
