"""What a newcomer types, on the real embedded model."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
import yaml

from proctor import api

from .conftest import Lab

GGUF = os.environ.get("PROCTOR_TEST_GGUF", "")
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not GGUF, reason="no embedded model: PROCTOR_TEST_GGUF is not set (`make test` sets it)"
)


def test_init_validate_run_status_score(lab: Lab) -> None:
    lab.run("init", str(lab.root))
    config = str(lab.root / "run.yaml")
    model = ("--set", f"models.smollm2.path={GGUF}")
    assert "is valid" in lab.run("validate", config, *model).stdout
    first = lab.run("run", config, *model)
    assert "accuracy" in first.stdout
    assert "12" in first.stdout
    again = lab.run("run", config, *model)
    assert "0 requests to ask, 48 answered already" in again.stderr
    assert again.stdout == first.stdout
    assert "48 of 48 requests answered" in lab.run("status", config, *model).stdout
    scored = json.loads(lab.run("score", config, *model, "--json", "--samples").stdout)
    assert scored["complete"]
    assert len(scored["samples"]) == 12
    sample = scored["samples"][0]
    assert {"prompt", "target", "responses", "extracted", "metrics"} <= set(sample)
    assert scored["rows"][0]["engines"][0].startswith("llama.cpp")


def test_the_demo(lab: Lab) -> None:
    run = yaml.safe_load((ROOT / "examples" / "demo" / "run.yaml").read_text())
    run |= {"store": "./store", "runs": "./runs", "models": {"m": {"path": GGUF}}}
    # One thread: two that wait for each other are slow beside the rest of the test suite.
    run |= {"engine": {"type": "openai", "server": {"type": "llama.cpp", "threads": 1}}}
    run["tasks"] = [
        {"native": ["demo:opposites", "demo:capitals"], "limit": 20},
        {"native": "demo:passages", "limit": 3},
    ]
    config = lab.root / "run.yaml"
    config.write_text(yaml.safe_dump(run))
    outcome = asyncio.run(api.run(config))
    assert outcome.complete
    rows = {(r.task, r.metric): r for r in outcome.scores.rows}
    assert rows["demo:opposites", "accuracy"].n >= 20
    assert (rows["demo:opposites", "accuracy"].value or 0) > 0.6
    assert rows["demo:capitals", "contains"].n >= 20
    perplexity = rows["demo:passages", "word_perplexity"]
    assert perplexity.n == 3
    assert 10 < (perplexity.value or 0) < 120
