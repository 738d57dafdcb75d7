"""What answers of an lm-eval model class are stored under. Apart from the class's driver, which needs much more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from proctor.config.spec import LmEvalModelEngine as LmEvalSpec
from proctor.records import digest

VERSION: Final = 1
"""Raised when `lm_eval_model` asks the classes differently."""


def resolution_digest(
    spec: LmEvalSpec, *, tokenizer: str, template: str, generation_config: Mapping[str, Any] | None = None
) -> str:
    """Digest of all that turns a logical request into what this class asks its model.

    The class and its arguments, the digests of tokenizer and chat template (`infer.tokenizer`), and the model's
    generation_config.json, which the classes obey. Not lm-eval's version, nor where and in what batches it runs.
    """
    return digest(
        {
            "engine": f"lm_eval:{spec.model}",
            "version": VERSION,
            "model_args": spec.model_args,
            "tokenizer": tokenizer,
            "template": template,
            "generation_config": dict(generation_config or {}),
        }
    )
