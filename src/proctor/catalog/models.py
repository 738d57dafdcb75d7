"""The models of a run, one entry for each checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from proctor.catalog import embedded, hub
from proctor.catalog.checkpoints import Checkpoint, children, discover, has_weights, is_weight_file, match_pattern
from proctor.config.paths import HUB, local_path
from proctor.config.spec import ModelSpec, RunSpec, is_url
from proctor.errors import ModelError, ProctorError, nearest

_GGUF_MAGIC: Final = b"GGUF"
_SPLIT: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")


class ModelKind(StrEnum):
    """How a model comes to us."""

    DIRECTORY = "directory"
    GGUF = "gguf"
    HUB = "hub"
    EMBEDDED = "embedded"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One set of weights to be asked. Entries of one training run share their `model_key`."""

    name: str
    """The key under `models:`."""
    display_name: str
    model_key: str
    label: str
    """The checkpoint's directory name, or main."""
    step: int | None
    kind: ModelKind
    path: str
    """What a server is given: a directory (for hub ids, of the cached snapshot) or a GGUF file; an endpoint's URL."""
    source: str
    """The path as the configuration has it."""
    tokenizer: str | None = None
    """Directory or file of the tokenizer, where it is not the model's own."""
    revision: str | None = None
    """Hub: the commit. Endpoint: as declared."""
    urls: tuple[str, ...] = ()
    """Endpoint: every base URL, without a trailing slash and without /v1."""
    served_model: str | None = None
    api_key_env: str | None = None
    tokens_trained: int | None = None
    train_batch_size: int | None = None
    trust_remote_code: bool = False
    adapters: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """Display name, with the label where there is more than main."""
        return self.display_name if self.label == "main" else f"{self.display_name} {self.label}"


def expand_models(spec: RunSpec) -> list[ModelEntry]:
    """Every model and checkpoint of a run, in the order of the configuration and then by step.

    Looks at files and at the local hub cache only. Raises ModelError for weights that are missing,
    unreadable or not what their name says, for a requested step that is absent, and for two entries that
    have the same model key and label.
    """
    entries = [entry for name, model in spec.models.items() for entry in _expand(name, model)]
    seen: dict[tuple[str, str], ModelEntry] = {}
    for entry in entries:
        other = seen.setdefault((entry.model_key, entry.label), entry)
        if other is not entry:
            raise ModelError(
                f"models.{other.name} and models.{entry.name} are both {entry.model_key!r} at {entry.label!r}: "
                f"{other.source!r} and {entry.source!r}",
                hint="give one of them another `model_key:`, or take the checkpoint out of one",
            )
    return entries


def missing_models(spec: RunSpec) -> list[str]:
    """What `fetch_model` could bring: hub ids and embedded models of this run that are not on this machine."""
    return list(_missing(spec))


def fetch_missing(spec: RunSpec) -> list[ProctorError]:
    """Bring all of `missing_models` to this machine, tokenizers without weights; what went wrong, name by name."""
    errors: list[ProctorError] = []
    for name, tokenizer in _missing(spec).items():
        try:
            if name.startswith(embedded.SCHEME):
                embedded.fetch(name)
            else:
                hub_id, _, revision = name.removeprefix(HUB).partition("@")
                hub.fetch_hub(hub_id, revision or None, tokenizer=tokenizer)
        except ProctorError as error:
            errors.append(error)
    return errors


def _missing(spec: RunSpec) -> dict[str, bool]:
    """Name → whether only a tokenizer is wanted of it."""
    out: dict[str, bool] = {}
    for model in spec.models.values():
        if model.path.startswith(embedded.SCHEME):
            if embedded.locate(model.path) is None:
                out[model.path] = False
        elif not is_url(model.path) and local_path(model.path, Path()) is None:
            _want(out, model.path, model.revision, tokenizer=False)
        for path in (model.tokenizer, *model.adapters):
            if path is not None and not is_url(path) and local_path(path, Path()) is None:
                name, _, revision = path.partition("@")
                _want(out, name, revision or None, tokenizer=path == model.tokenizer)
    return out


def _want(out: dict[str, bool], path: str, revision: str | None, *, tokenizer: bool) -> None:
    snapshot = hub.find_snapshot(path.removeprefix(HUB), revision)
    # A tokenizer alone, or a download that was interrupted, leaves a snapshot without weights.
    if snapshot is None or not (tokenizer or has_weights(snapshot.path)):
        name = path if revision is None else f"{path}@{revision}"
        out[name] = tokenizer and out.get(name, True)


def fetch_model(name: str) -> Path:
    """Bring `embedded:NAME`, or a hub id `[hub:]ORG/NAME[@REVISION]`, to this machine; where it is then.

    Raises ModelError, UnknownName or MissingTool.
    """
    if name.startswith(embedded.SCHEME):
        return embedded.fetch(name)
    hub_id, _, revision = name.removeprefix(HUB).partition("@")
    return hub.fetch_hub(hub_id, revision or None)


def _expand(name: str, model: ModelSpec) -> list[ModelEntry]:
    try:
        if is_url(model.path):
            return [_endpoint(name, model)]
        return [_entry(name, model, kind, checkpoint) for kind, checkpoint in _weights(model)]
    except ModelError as error:
        raise ModelError(f"models.{name}: {error.message}", hint=error.hint) from error


def _endpoint(name: str, model: ModelSpec) -> ModelEntry:
    urls = tuple(dict.fromkeys(base_url(url) for url in (model.path, *model.urls)))
    return ModelEntry(
        name=name,
        display_name=model.display_name or name,
        model_key=model.model_key or name,
        label="main",
        step=None,
        kind=ModelKind.ENDPOINT,
        path=urls[0],
        source=model.path,
        tokenizer=_tokenizer(model),
        revision=model.revision,
        urls=urls,
        served_model=model.served_model,
        api_key_env=model.api_key_env,
        tokens_trained=_tokens(model, None),
        train_batch_size=model.train_batch_size,
        trust_remote_code=model.trust_remote_code,
    )


def base_url(url: str) -> str:
    """A base URL without trailing slashes and without /v1."""
    return re.sub(r"(/v1)?/*\Z", "", url.rstrip("/"))


def _entry(name: str, model: ModelSpec, kind: ModelKind, checkpoint: Checkpoint) -> ModelEntry:
    offset = model.checkpoints.step_offset if model.checkpoints else 0
    return ModelEntry(
        name=name,
        display_name=model.display_name or name,
        model_key=model.model_key or name,
        label=checkpoint.label,
        step=None if checkpoint.step is None else checkpoint.step + offset,
        kind=kind,
        path=str(checkpoint.path),
        source=model.path,
        tokenizer=_tokenizer(model),
        revision=checkpoint.commit or model.revision,
        tokens_trained=_tokens(model, checkpoint.step),
        train_batch_size=model.train_batch_size,
        trust_remote_code=model.trust_remote_code,
        adapters=tuple(str(_adapter(path)) for path in model.adapters),
    )


def _tokens(model: ModelSpec, raw_step: int | None) -> int | None:
    """Tokens seen: the stated number, the one listed for this step, or batch size times raw step."""
    stated = model.tokens_trained
    if isinstance(stated, tuple):
        steps = model.checkpoints.steps if model.checkpoints else None
        return stated[steps.index(raw_step)] if steps and raw_step is not None else None
    if stated is not None or raw_step is None or model.train_batch_size is None:
        return stated
    return model.train_batch_size * raw_step


def _weights(model: ModelSpec) -> Sequence[tuple[ModelKind, Checkpoint]]:
    if model.path.startswith(embedded.SCHEME):
        return [(ModelKind.EMBEDDED, Checkpoint(path=embedded.require(model.path), label="main", step=None))]
    local = local_path(model.path, Path())
    if local is None:
        return _hub_weights(model)
    if not os.path.exists(local):
        raise ModelError(f"no such file or directory: {str(local)!r}{_siblings(local)}")
    if local.is_file():
        _check_gguf(local)
        return [(ModelKind.GGUF, Checkpoint(path=local, label="main", step=None))]
    if model.checkpoints is None:
        if not has_weights(local):
            raise _no_weights(local)
        return [_directory(Checkpoint(path=local, label="main", step=None))]
    if model.checkpoints.pattern is None:
        return [_directory(c) for c in discover(local)]
    found = match_pattern(local, model.checkpoints.pattern, model.checkpoints.steps)
    for checkpoint in found:
        if not has_weights(checkpoint.path):
            raise _no_weights(checkpoint.path)
    return [_directory(c) for c in found]


def _directory(checkpoint: Checkpoint) -> tuple[ModelKind, Checkpoint]:
    """A directory whose only weights are one GGUF model stands for that file."""
    names = [p.name for p in children(checkpoint.path) if is_weight_file(p.name)]
    if not all(n.endswith(".gguf") for n in names):
        return ModelKind.DIRECTORY, checkpoint
    heads = [n for n in names if not (m := _SPLIT.search(n)) or int(m[1]) == 1]
    if len(heads) != 1:
        raise ModelError(
            f"{str(checkpoint.path)!r} holds {len(heads)} GGUF models: {', '.join(map(repr, heads[:6]))}",
            hint="name one of the files as the model's `path:`",
        )
    file = checkpoint.path / heads[0]
    _check_gguf(file)
    return ModelKind.GGUF, replace(checkpoint, path=file)


def _hub_weights(model: ModelSpec) -> Sequence[tuple[ModelKind, Checkpoint]]:
    hub_id = model.path.removeprefix(HUB)
    snapshot = hub.find_snapshot(hub_id, model.revision)
    if snapshot is None:
        raise _not_cached(hub_id, model.revision)
    if model.checkpoints is not None:
        raise ModelError("`checkpoints:` are directories of a local path, not of a hub id")
    if not has_weights(snapshot.path):
        raise _no_weights(snapshot.path)
    kind, found = _directory(Checkpoint(path=snapshot.path, label="main", step=None, commit=snapshot.commit))
    return [(ModelKind.HUB if kind is ModelKind.DIRECTORY else kind, found)]


def _not_cached(hub_id: str, revision: str | None) -> ModelError:
    at = f"@{revision}" if revision else ""
    cached = hub.cached_revisions(hub_id)
    if cached and revision:
        detail = f"; the cache has {', '.join(map(repr, cached[:6]))}"
    else:
        near = nearest(hub_id, hub.cached_ids())
        detail = f"; cached ones with a similar name: {', '.join(map(repr, near))}" if near else ""
    return ModelError(
        f"{hub_id!r} is neither a local path nor in the hub cache {str(hub.hub_cache())!r}"
        f"{f' at revision {revision!r}' if revision else ''}{detail}",
        hint=f"to download it: proctor models --fetch {hub_id}{at}; a local directory is written ./{hub_id}",
    )


def _no_weights(directory: Path) -> ModelError:
    try:
        n = len(discover(directory))
    except ModelError:
        return ModelError(f"no weights (*.safetensors, *.bin, *.gguf) in {str(directory)!r}")
    return ModelError(
        f"no weights in {str(directory)!r} itself, but in {n} director{'y' if n == 1 else 'ies'} below it",
        hint="add `checkpoints: {discover: true}`, or `checkpoints: {pattern: ...}`",
    )


def _siblings(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        if parent == parent.parent:
            return ""
        path, parent = parent, parent.parent
    try:
        names = sorted(p.name for p in parent.iterdir())
    except OSError:
        return ""
    near = nearest(path.name, names)
    if near:
        return f"; did you mean {' or '.join(repr(str(parent / n)) for n in near)}?"
    return f"; {str(parent)!r} contains {', '.join(map(repr, names[:6])) or 'nothing'}{', …' if len(names) > 6 else ''}"


def _check_gguf(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {str(file)!r}: {error.strerror}") from error
    if magic == _GGUF_MAGIC:
        return
    if file.suffix == ".gguf":
        raise ModelError(f"{str(file)!r} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    raise ModelError(
        f"{str(file)!r} is a file, but not a GGUF model",
        hint="name the directory that holds config.json and the weights",
    )


def _tokenizer(model: ModelSpec) -> str | None:
    return None if model.tokenizer is None else str(_part(model.tokenizer, "tokenizer"))


def _adapter(path: str) -> Path:
    found = _part(path, "adapter")
    if found.is_dir() and not has_weights(found):
        raise ModelError(f"the adapter {str(found)!r} holds no weights (adapter_model.safetensors or .bin)")
    return found


def _part(path: str, what: str) -> Path:
    local = local_path(path, Path())
    if local is not None:
        if not os.path.exists(local):
            raise ModelError(f"no such {what}: {str(local)!r}{_siblings(local)}")
        return local
    hub_id, _, revision = path.removeprefix(HUB).partition("@")
    snapshot = hub.find_snapshot(hub_id, revision or None)
    if snapshot is None:
        raise _not_cached(hub_id, revision or None)
    return snapshot.path
