"""Text to token ids, with the `tokenizers` library and a model directory's own files."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import tokenizers
from tokenizers import processors

from proctor.errors import ModelError
from proctor.infer.chat_template import DEFAULT_DATE, ChatTemplates, read_templates
from proctor.infer.tokenizer_directory import (
    missing_tokens,
    read_config,
    read_json,
    rebuild_as_llama,
    rebuilt_as_llama,
    special_tokens,
)
from proctor.records import digest

SLOW_FILES: Final = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


class Tokenizer(Protocol):
    """Encodes for one model. Implementations: LocalTokenizer, and the servers' own in `infer.server_tokenizer`."""

    @property
    def identity(self) -> str:
        """Digest of everything that decides the ids."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """bos_token, eos_token, ... as text, where the model has them."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """bos_token and eos_token as ids, where the model has them."""
        ...

    @property
    def templates(self) -> ChatTemplates | None:
        """None: the model has no chat template."""
        ...

    async def encode(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of each (text, whether to add the special tokens that the tokenizer adds by itself), in order."""
        ...


class LocalTokenizer:
    """A tokenizer.json with its tokenizer_config.json, as transformers 5 reads them (`AutoTokenizer`).

    What the configuration says of BOS and EOS is not obeyed there: the file's own post-processor is.
    """

    def __init__(self, directory: Path, *, add_bos_token: bool | None = None, date: str = DEFAULT_DATE) -> None:
        """Load from `directory`. `add_bos_token` replaces the model's own choice, as an argument of from_pretrained.

        Raises ModelError if there is no tokenizer.json, or if it or its configuration is malformed.
        """
        config = read_config(directory)
        self._tokenizer = _load(directory)
        if rebuilt_as_llama(directory, config, self._tokenizer):
            rebuild_as_llama(config, self._tokenizer)
        self._tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        self._special = special_tokens(directory, config)
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        missing = missing_tokens(directory, config, known=known, named=self._special.values())
        self._tokenizer.add_tokens(missing)  # pyright: ignore[reportUnknownMemberType, reportArgumentType]
        self._ids = {
            name: token
            for name in ("bos_token", "eos_token")
            if name in self._special and (token := self._tokenizer.token_to_id(self._special[name])) is not None
        }
        if add_bos_token is not None:
            self._set_post_processor(add_bos_token)
        sources = read_templates(directory, config)
        self._templates = ChatTemplates(sources=sources, special_tokens=self._special, date=date) if sources else None
        self._identity = digest([tokenizer_digest(directory), add_bos_token])

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return self._special

    @property
    def special_ids(self) -> Mapping[str, int]:
        return self._ids

    @property
    def templates(self) -> ChatTemplates | None:
        return self._templates

    async def encode(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        return await asyncio.to_thread(self.encode_now, texts)

    def encode_now(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """`encode` on this thread; the library uses all cores by itself."""
        out: list[list[int]] = [[]] * len(texts)
        for special in (True, False):
            where = [i for i, (_, add) in enumerate(texts) if add is special]
            batch = [texts[i][0] for i in where]
            encoded = self._tokenizer.encode_batch_fast(batch, add_special_tokens=special) if batch else []
            for i, one in zip(where, encoded, strict=True):
                out[i] = one.ids
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _set_post_processor(self, bos: bool) -> None:
        single, pair, tokens = "$A:0", "$A:0 $B:1", list[tuple[str, int]]()
        if bos and "bos_token" in self._ids:
            text = self._special["bos_token"]
            tokens = [(text, self._ids["bos_token"])]
            single, pair = f"{text}:0 $A:0", f"{text}:0 $A:0 {text}:1 $B:1"
        self._tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=single, pair=pair, special_tokens=tokens
        )


def tokenizer_digest(directory: Path | None) -> str:
    """Digest of the files that decide the ids; "none" without a local tokenizer. Reads, never loads."""
    if directory is None:
        return "none"
    config = read_config(directory)
    kept = {k: v for k, v in config.items() if k not in ("chat_template", "name_or_path", "processor_class")}
    try:
        vocabulary = digest((directory / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _no_tokenizer(directory) from error
    return digest([vocabulary, kept, read_json(directory / "special_tokens_map.json")])


def template_digest(directory: Path | None, *, date: str = DEFAULT_DATE) -> str:
    """Digest of the directory's chat templates and the pinned date; "none" without a local tokenizer."""
    return "none" if directory is None else digest([read_templates(directory, read_config(directory)), date])


def _load(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise _no_tokenizer(directory)
    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ModelError(f"cannot read {str(path)!r}: {error}") from error
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _no_tokenizer(directory: Path) -> ModelError:
    slow = [name for name in SLOW_FILES if (directory / name).is_file()]
    if slow:
        return ModelError(
            f"{str(directory)!r} has only a slow tokenizer ({', '.join(slow)})",
            hint="convert it once: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) with transformers; "
            "or use engine {type: lm_eval, model: hf}",
        )
    return ModelError(
        f"no tokenizer.json in {str(directory)!r}",
        hint="set `tokenizer:` of the model to a directory that has one",
    )
