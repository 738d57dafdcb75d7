"""Holds one lm-eval model and answers slices: python -m proctor.infer.lm_eval_host READ_FD WRITE_FD

Runs in the environment that has lm-eval; needs it and the standard library only. Messages are JSON texts, each
behind its length as eight big-endian bytes, on two pipes of their own: libraries write to standard output as
they like. The first message says what to load; the answer to it is `ready` or `error`. Then every message is a
slice of requests of one kind, and every answer holds one result for each, or `error` for the slice.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import random
import struct
import sys
import traceback
from collections.abc import Generator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

_LENGTH: Final = struct.Struct(">Q")
_PACKAGES: Final = ("lm_eval", "transformers", "torch", "vllm", "sglang")


def read_message(source: BinaryIO) -> Any | None:
    """The next message; None at the end."""
    head = source.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    body = source.read(_LENGTH.unpack(head)[0])
    return json.loads(body)


def frame(message: Any) -> bytes:
    """The bytes of one message."""
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def main(read_fd: int, write_fd: int) -> int:
    with open(read_fd, "rb") as source, open(write_fd, "wb", buffering=0) as sink:
        orders = read_message(source)
        if orders is None:
            return 0
        try:
            model = load(orders)
            sink.write(frame({"ready": describe(model)}))
        except Exception as error:  # noqa: BLE001 - whatever a model class raises is the answer
            traceback.print_exc()
            missing = isinstance(error, ModuleNotFoundError) and error.name == "lm_eval"
            sink.write(frame({"error": _say(error), "missing": missing, "names": _class_names()}))
            return 1
        while (message := read_message(source)) is not None:
            sink.write(frame({"id": message["id"], **_serve(model, message)}))
    return 0


def load(orders: Mapping[str, Any]) -> Any:
    """Build the model as lm-eval's own entry point does: same seeds, same constructor, same arguments."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    random_seed, numpy_seed, torch_seed = orders["seeds"]
    registry = importlib.import_module("lm_eval.api.registry")
    random.seed(random_seed)
    importlib.import_module("numpy").random.seed(numpy_seed)
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("torch").manual_seed(torch_seed)
    kind = registry.get_model(orders["model"])
    arguments = complete(kind, orders)
    device = orders["device"] or default_device()
    common = {"batch_size": orders["batch_size"], "max_batch_size": None, "device": device}
    print(f"loading {kind.__module__}.{kind.__qualname__} with {arguments} {common}", flush=True)  # noqa: T201
    return kind.create_from_arg_obj(arguments, common)


def default_device() -> str | None:
    """What lm-eval's command line gives a class when --device is not given; None if it says nothing.

    `hf` takes it where it is a device of this machine and falls back to what there is; its own default, `cuda`,
    it would take as an order.
    """
    with contextlib.suppress(ModuleNotFoundError):
        config = importlib.import_module("lm_eval.config.evaluate_config").EvaluatorConfig
        return config.__dataclass_fields__["device"].default
    return None


def _class_names() -> list[str]:
    registry = sys.modules.get("lm_eval.api.registry")
    return sorted(registry.model_registry.keys()) if registry is not None else []


def complete(kind: type, orders: Mapping[str, Any]) -> dict[str, Any]:
    """The model arguments, with the weights' path under the name that the class uses, unless they are named."""
    arguments = dict(orders["model_args"])
    known = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    path = orders["path"]
    if not {"pretrained", "model"} & set(arguments):
        if path.endswith(".gguf") and "gguf_file" in known:
            arguments |= {"pretrained": str(Path(path).parent), "gguf_file": Path(path).name}
        elif "pretrained" in known:
            arguments["pretrained"] = path
        elif "model" in known:
            arguments["model"] = path
    for name in ("revision", "trust_remote_code", "tokenizer"):
        if orders.get(name) and name in known:
            arguments.setdefault(name, orders[name])
    return arguments


def describe(model: Any) -> dict[str, Any]:
    """What the class and its libraries say about themselves."""
    inner = getattr(model, "model", None)
    dtype = getattr(inner, "dtype", None) or getattr(model, "dtype", None)
    device = str(getattr(model, "device", None) or getattr(model, "_device", "unknown"))
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "versions": _versions(),
        "dtype": str(dtype).removeprefix("torch.") if dtype is not None else "unknown",
        "device": device,
        "gpus": _gpu_names() if device.startswith("cuda") else [],
        "max_length": _number(model, "max_length"),
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _gpu_names() -> list[str]:
    cuda = importlib.import_module("torch").cuda
    return [cuda.get_device_name(index) for index in range(cuda.device_count())]


def _number(model: Any, name: str) -> int | None:
    # Properties of model classes may raise what they like.
    with contextlib.suppress(Exception):
        value = getattr(model, name)
        return value if isinstance(value, int) else None
    return None


def _serve(model: Any, message: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"results": answer(model, message["kind"], message["requests"])}
    except Exception as error:  # noqa: BLE001 - whatever a model class raises is this slice's result
        traceback.print_exc()
        _free_memory()
        return {"error": _say(error)}


def answer(model: Any, kind: str, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One result for each request, in order: its value and its token counts, or `error` if it cannot be rendered."""
    instance = importlib.import_module("lm_eval.api.instance").Instance
    results: list[dict[str, Any]] = [{} for _ in requests]
    asked: list[tuple[int, Any]] = []
    for index, request in enumerate(requests):
        try:
            text = render(model, request)
        except Exception as error:  # noqa: BLE001 - a template may raise anything; it is this request's result
            results[index] = {"error": _say(error)}
            continue
        arguments = {
            "loglikelihood": (text, request.get("continuation", "")),
            "loglikelihood_rolling": (text,),
            "generate_until": (text, json.loads(request.get("arguments", "{}"))),
        }[kind]
        asked.append((index, instance(request_type=kind, doc={}, arguments=arguments, idx=0)))
    values: list[Any] = getattr(model, kind)([item for _, item in asked]) if asked else []
    if len(values) != len(asked):
        raise RuntimeError(f"{type(model).__name__}.{kind} gave {len(values)} answers to {len(asked)} requests")
    for (index, item), value in zip(asked, values, strict=True):
        results[index] = {"value": value, **count(model, kind, item.args, value)}
    return results


def render(model: Any, request: Mapping[str, Any]) -> str:
    """The prompt text; a conversation by the class's own template."""
    if "messages" not in request:
        return request.get("text", "")
    history = [{"role": role, "content": content} for role, content in request["messages"]]
    extra = json.loads(request.get("template_arguments", "{}"))
    name = extra.pop("chat_template", None)
    templates: Any = getattr(getattr(model, "tokenizer", None), "chat_template", None)
    # With a single template lm-eval ignores the name, and so does this.
    if name is not None and isinstance(templates, Mapping):
        names = sorted(cast("Mapping[str, str]", templates))
        if name not in names:
            raise ValueError(f"no chat template {name!r}; the tokenizer has {', '.join(names)}")
        extra["chat_template"] = name
    with _template_arguments(model, extra):
        return model.apply_chat_template(history, add_generation_prompt=request.get("add_generation_prompt", True))


@contextlib.contextmanager
def _template_arguments(model: Any, extra: Mapping[str, Any]) -> Generator[None]:
    if not extra:
        yield
        return
    if not hasattr(model, "chat_template_args"):
        raise ValueError(f"{type(model).__name__} takes no template arguments ({', '.join(extra)})")
    before = model.chat_template_args
    model.chat_template_args = {**before, **extra}
    try:
        yield
    finally:
        model.chat_template_args = before


def count(model: Any, kind: str, arguments: Sequence[Any], value: Any) -> dict[str, int]:
    """Prompt, completion and cut tokens, for classes with a tokenizer; the rules of lm-eval's local classes."""
    window, encode = _number(model, "max_length"), getattr(model, "tok_encode", None)
    if window is None or encode is None or getattr(model, "tokenizer", None) is None:
        return {}

    def length(text: str) -> int:
        ids: Any = encode(text)
        return len(ids)

    prompt = length(arguments[0])
    if kind == "generate_until":
        asked = next((arguments[1][name] for name in _LENGTH_NAMES if arguments[1].get(name) is not None), None)
        room = int(asked) if asked is not None else (_number(model, "max_gen_toks") or 256)
        return {"prompt": prompt, "completion": length(value), "cut": max(0, prompt - (window - room))}
    if kind == "loglikelihood":
        whole = length(arguments[0] + arguments[1])
        return {"prompt": whole, "completion": 0, "cut": max(0, whole - window - 1)}
    return {"prompt": prompt, "completion": 0, "cut": 0}


_LENGTH_NAMES: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
