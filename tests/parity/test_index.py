"""The names that lm-eval knows: its own and the added ones, listed apart and put together as it would itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from proctor.catalog.lm_eval.source import merged
from proctor.interpreters import module_command

pytestmark = pytest.mark.parity

PYTHON = os.environ.get("PROCTOR_LM_EVAL_PYTHON")
DRIVER = Path(__file__).with_name("index_driver.py")


@pytest.mark.skipif(PYTHON is None, reason="lm-eval: PROCTOR_LM_EVAL_PYTHON is not set")
def test_added_tasks_take_the_place_of_lm_evals_own(tmp_path: Path) -> None:
    files = {
        "own/a.yaml": "task: a\ntag: [letters, first]\n",
        "own/b.yaml": "task: b\ntag: letters\n",
        "own/group.yaml": "group: both\ntask: [a, b]\n",
        "own/deep/c.yaml": "include: ../a.yaml\ntask: c\n",
        "added/b.yaml": "task: b\ntag: [letters, mine]\n",
        "added/group.yaml": "group: first\ntask: [a, d]\n",
        "added/d.yaml": "task: d\n",
        "added/broken.yaml": "task: [\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    env = module_command(PYTHON, "json").env
    command = [str(PYTHON), str(DRIVER), str(tmp_path / "own"), str(tmp_path / "added")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    listed = json.loads(done.stdout)
    assert merged(listed["own"], listed["added"]) == listed["whole"]
    paths = {row[0]: row[2] for row in listed["whole"]}
    assert set(paths) == {"a", "b", "c", "d", "both", "first", "letters", "mine"}
    assert paths["b"] == str(tmp_path / "added/b.yaml")
