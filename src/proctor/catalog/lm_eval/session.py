"""One run of lm-eval's `simple_evaluate` over one prepared set of tasks: the same seeds, order and defaults as its own.

Runs where lm-eval is. Recording and replay both go through lm-eval's entry point, so that nothing of it (seeds,
the rules for shots and generation arguments, limits, chat) is written a second time here.
"""

# lm-eval is not in the environment that the types are checked in.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools
import importlib.abc
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.evaluator as evaluator
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.utils import handle_non_serializable

from proctor.catalog.lm_eval import chat
from proctor.errors import TaskError
from proctor.records import digest

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_OFFLINE_FLAGS = {
    "huggingface_hub.constants": ("HF_HUB_OFFLINE",),
    "datasets.config": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
    "evaluate.config": ("HF_EVALUATE_OFFLINE",),
}


def version() -> str:
    """lm-eval's."""
    return str(lm_eval.__version__)


def metadata() -> str:
    """A directory that another version of lm-eval would not have: its dist-info, else its package."""
    found = importlib.metadata.distribution("lm_eval")
    directory = Path(str(found.locate_file(f"lm_eval-{found.version}.dist-info")))
    return str(directory if directory.is_dir() else Path(str(lm_eval.__file__)).parent)


class Prepared:
    """Stands for lm-eval's TaskManager in `simple_evaluate`: `load` calls `make`, after the seeds are set."""

    def __init__(self, make: Callable[[], dict[str, Task]], groups: Mapping[str, Group]) -> None:
        self._make = make
        self._groups = dict(groups)
        self.task_index: dict[str, Any] = {}

    def load(self, _names: Any) -> dict[str, Any]:
        """As TaskManager.load."""
        return {
            "tasks": self._make(),
            "groups": self._groups,
            "group_map": {name: group.child_names for name, group in self._groups.items()},
        }


class Model(LM):
    """What lm-eval takes for a model: `answer(kind, requests)` gives the answers, chat prompts stay messages."""

    tokenizer_name = "proctor"  # pyright: ignore[reportAssignmentType]

    def __init__(self, answer: Callable[[str, list[Any]], list[Any]]) -> None:
        super().__init__()
        self._answer = answer

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        return self._answer("generate_until", requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat.render(chat_history, add_generation_prompt)


def evaluate(
    model: Model, prepared: Prepared, settings: Mapping[str, Any], *, limit: Any, samples: Any, bootstrap_iters: int
) -> dict[str, Any]:
    """`simple_evaluate` with the settings of a configuration entry. Raises whatever it raises."""
    evaluator.add_env_info = evaluator.add_tokenizer_info = lambda *_args: None
    evaluator.get_git_commit_hash = lambda: None
    evaluator.set_torch_seed = seed_torch
    if settings["trust_remote_code"]:
        datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = True
    seeds = settings["seeds"]
    results = evaluator.simple_evaluate(
        model=model,
        tasks=["prepared"],
        task_manager=prepared,
        num_fewshot=settings["num_fewshot"],
        limit=limit,
        samples=samples,
        bootstrap_iters=bootstrap_iters,
        log_samples=True,
        system_instruction=settings["system_instruction"],
        apply_chat_template=settings["apply_chat_template"],
        fewshot_as_multiturn=multiturn(settings),
        gen_kwargs=dict(settings["gen_kwargs"]) or None,
        random_seed=seeds[0],
        numpy_random_seed=seeds[1],
        torch_random_seed=seeds[2],
        fewshot_random_seed=settings["fewshot_seed"],
        confirm_run_unsafe_code=settings["confirm_unsafe_code"],
        metadata=dict(settings["metadata"]),
    )
    assert results is not None
    return results


def multiturn(settings: Mapping[str, Any]) -> bool:
    """As lm-eval's command line resolves it: with a chat template examples are turns unless the user says otherwise."""
    chosen = settings["fewshot_as_multiturn"]
    if chosen is None:
        return bool(settings["apply_chat_template"])
    if chosen and not settings["apply_chat_template"]:
        raise TaskError("fewshot_as_multiturn: true needs apply_chat_template")
    return bool(chosen)


def own_map_cache(directory: Path) -> None:
    """From now on, results of Dataset.map, filter and shuffle are cached in `directory` and looked up nowhere else.

    Not switched off: a task whose processing draws random numbers is processed several times in one run and
    must get the same documents each time, as it does with lm-eval and a fresh cache.
    """
    directory.mkdir(parents=True, exist_ok=True)
    original = Dataset._get_cache_file_path

    def redirected(self: Dataset, fingerprint: str) -> str:
        return str(directory / Path(original(self, fingerprint)).name)

    Dataset._get_cache_file_path = redirected


def config_digest(task: Task) -> str:
    """What the task's configuration says, functions by their source; not where its file lies."""
    config = dict(task.config.to_dict(keep_callable=True))
    if isinstance(config.get("metadata"), dict):
        config["metadata"] = {k: v for k, v in config["metadata"].items() if k != "config_source"}
    return digest(_plain(config))


def expressed(value: Any) -> Any:
    """What JSON cannot express, as lm-eval writes it into its results, without memory addresses."""
    plain = handle_non_serializable(value)
    return _ADDRESS.sub("", plain) if isinstance(plain, str) else plain


def _plain(value: Any) -> Any:
    if callable(value):
        return _source(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)
    return str(expressed(value))


def _source(value: Callable[..., Any]) -> Any:
    """A callable by what it would do, never by where it lies in memory: a partial application by its function."""
    if isinstance(value, functools.partial):
        return ["partial", _source(value.func), _plain(value.args), _plain(value.keywords)]
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return _ADDRESS.sub("", str(value))


class _SeedsTorch(importlib.abc.MetaPathFinder):
    """Finds torch as the others do, once, and seeds it when it has been imported."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute, seed = spec.loader.exec_module, self._seed

            def seeded(module: Any) -> None:
                execute(module)
                module.manual_seed(seed)

            spec.loader.exec_module = seeded
        return spec


def seed_torch(seed: int) -> None:
    """As lm-eval does it, but importing torch, which takes seconds, is left to the task that uses it.

    Nothing can have drawn from a torch that is not imported: its first draw is the same either way.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
        return
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _SeedsTorch)]
    sys.meta_path.insert(0, _SeedsTorch(seed))


def heed_offline() -> None:
    """Make the hub's libraries, which looked when they were imported, see that the environment says offline now."""
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    for name, attributes in _OFFLINE_FLAGS.items():
        module = sys.modules.get(name)
        for attribute in attributes:
            if offline and module is not None and hasattr(module, attribute):
                setattr(module, attribute, True)


class Offline:
    """An audit hook that keeps this process off the network and sees which big files it reads."""

    def __init__(self) -> None:
        self.block = False
        self.seen: set[str] = set()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            name = str(args[0])
            if name.endswith((".safetensors", ".gguf", ".pt", ".pth", "pytorch_model.bin")):
                self.seen.add("model")
            elif name.endswith(("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
                self.seen.add("tokenizer")
        elif event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            if event != "socket.getaddrinfo" and isinstance(args[1], str | bytes):
                return  # A Unix socket: between processes of this machine.
            self.seen.add("network")
            if self.block:
                raise ConnectionError(f"replay may not use the network ({event})")
