"""What a recording was made from: the same content is the same, whatever its times; anything else is not."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from proctor.catalog import inputs
from proctor.catalog.inputs import (
    HubInput,
    Inputs,
    differences,
    file_input,
    folder_input,
    hub_caches,
    known_commits,
    renewed,
)

COMMIT, OTHER = "a" * 40, "b" * 40


def of_file(path: Path) -> Inputs:
    one = file_input(path)
    assert one is not None
    return Inputs(files=(one,))


def later(path: Path, seconds: int = 5) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + seconds * 10**9))


@pytest.fixture
def file(tmp_path: Path, hostile_name: str) -> Path:
    path = tmp_path / hostile_name
    path.write_text("one")
    return path


def test_a_file_is_the_same_until_its_content_is_another(file: Path) -> None:
    seen = of_file(file)
    assert differences(seen) is None
    later(file)
    assert differences(seen) is None  # a checkout, a copy
    file.write_text("two")
    found = differences(seen)
    assert found is not None
    assert repr(str(file)) in found.what
    assert not found.gone


def test_a_file_with_its_old_size_and_time_in_another_inode_is_read(tmp_path: Path) -> None:
    path, fresh = tmp_path / "a", tmp_path / "b"
    path.write_text("one")
    seen, stat = of_file(path), path.stat()
    fresh.write_text("two")
    fresh.replace(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert differences(seen) is not None


def test_a_file_that_is_gone_may_be_the_same_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    seen = of_file(path)
    path.unlink()
    found = differences(seen)
    assert found is not None
    assert found.gone


def test_what_changed_since_it_was_opened_is_no_input(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    (one,) = of_file(path).files
    later(path)
    assert file_input(path, one.stamp) is None
    assert file_input(tmp_path / "none") is None


def test_a_file_too_large_to_read_counts_by_its_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "COPIED", 2)
    path = tmp_path / "a"
    path.write_text("one")
    seen = of_file(path)
    assert differences(seen) is None
    later(path)
    assert differences(seen) is not None


def test_a_tree_counts_what_is_in_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.yaml").write_text("a: 1")
    (tmp_path / "b.txt").write_text("b")
    seen = Inputs(folders=(folder_input(tmp_path, ".yaml"),))
    (tmp_path / "b.txt").write_text("other")
    later(tmp_path / "deep" / "a.yaml")
    assert differences(seen) is None
    (tmp_path / "deep" / "a.yaml").write_text("a: 2")
    assert differences(seen) is not None
    (tmp_path / "deep" / "a.yaml").write_text("a: 1")
    assert differences(seen) is None
    (tmp_path / "c.yaml").write_text("c: 1")
    assert differences(seen) is not None


def test_a_listing_counts_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    seen = Inputs(folders=(folder_input(tmp_path),))
    (tmp_path / "a").write_text("other")
    (tmp_path / "__pycache__").mkdir()
    assert differences(seen) is None
    (tmp_path / "b").write_text("b")
    assert differences(seen) is not None


def test_new_stamps_are_taken_over_only_with_the_same_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    for path in (one, two):
        path.write_text("old")
    files = tuple(f for p in (one, two) for f in of_file(p).files)
    seen = Inputs(files=files, folders=(folder_input(tmp_path, ".yaml"),))
    later(one)
    two.write_text("new")
    fresh = renewed(seen)
    assert fresh.files[0].stamp[1] == one.stat().st_mtime_ns
    assert fresh.files[1:] == seen.files[1:]
    assert fresh.folders == seen.folders
    assert differences(fresh) is not None


def test_inputs_survive_json(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    seen = replace(
        of_file(tmp_path / "a"),
        folders=(folder_input(tmp_path),),
        hubs=(HubInput(repo="o/n", commit=COMMIT, pinned=False),),
    )
    assert Inputs.from_json(json.loads(json.dumps(seen.to_json()))) == seen


# --- hubs ---


def cached(root: Path, commit: str) -> Path:
    refs = root / "datasets--org--name" / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    (refs / "main").write_text(commit)
    return root


def test_a_data_set_is_the_same_until_this_machine_knows_a_newer_commit(tmp_path: Path) -> None:
    seen = Inputs(hubs=(HubInput(repo="org/name", commit=COMMIT, pinned=False),))
    assert differences(seen, [tmp_path]) is None  # nothing is known here
    assert differences(seen, [cached(tmp_path, COMMIT)]) is None
    found = differences(seen, [cached(tmp_path, OTHER)])
    assert found is not None
    assert "org/name" in found.what
    assert not found.gone
    pinned = Inputs(hubs=(replace(seen.hubs[0], pinned=True),))
    assert differences(pinned, [tmp_path]) is None


def test_the_data_that_was_prepared_last_is_what_would_be_taken(tmp_path: Path) -> None:
    for n, commit in enumerate((OTHER, COMMIT)):
        place = tmp_path / "org___name" / "default" / "0.0.0" / commit
        place.mkdir(parents=True)
        os.utime(place, ns=(n * 10**9, n * 10**9))
    (tmp_path / "org___name" / "default" / "0.0.0" / "unfinished").mkdir()
    assert known_commits("Org/Name", [tmp_path]) == {COMMIT}


def test_the_caches_are_where_the_hubs_libraries_have_them(tmp_path: Path) -> None:
    assert hub_caches({"HF_HOME": "/h"}) == (Path("/h/hub"), Path("/h/datasets"))
    assert hub_caches({"HF_HUB_CACHE": "/a", "HF_DATASETS_CACHE": "/b"}) == (Path("/a"), Path("/b"))
    assert hub_caches({"XDG_CACHE_HOME": "/x"})[0] == Path("/x/huggingface/hub")
