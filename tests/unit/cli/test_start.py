import json
import subprocess
import sys
from pathlib import Path

import pytest

from proctor.cli import VERBS, run

HEAVY = ("pydantic", "aiohttp", "pyarrow", "numpy", "rich", "yaml", "orjson", "tokenizers")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, proctor.cli\n"
        "try: proctor.cli.run(['--help'])\n"
        "finally: print([m for m in sys.argv[1:] if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert "Usage: proctor " + verb in capsys.readouterr().out


def test_a_mistyped_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stauts"]) == 2
    assert "did you mean 'status'" in capsys.readouterr().err


def test_init_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", str(tmp_path)]) == 0
    (tmp_path / "run.yaml").write_text("mine")
    assert run(["init", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_text() == "mine"
    assert run(["init", "--force", str(tmp_path)]) == 0


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "--schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_tasks_lists_the_packaged_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tasks", "demo:", "--source", "native", "--json"]) == 0
    assert {t["name"] for t in json.loads(capsys.readouterr().out)} >= {"demo:opposites", "demo:capitals"}
