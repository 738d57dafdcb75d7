"""Whether the ids that are sent mean to the server what they mean here.

A server answers whatever ids it gets. With another model's tokenizer they are other words, and every score is one of
noise: nothing else would show it.
"""

from __future__ import annotations

from typing import Final

from proctor.errors import ModelError
from proctor.infer.client import Client
from proctor.infer.dialect import Dialect
from proctor.infer.server_tokenizer import read_tokens, tokenize_body
from proctor.infer.tokenizer import Tokenizer

TEXT: Final = "the capital of France is Paris, and the capital of Italy is Rome"
"""Words that all programs read alike with one vocabulary; at edges, such as before a space, they differ."""
SHOWN: Final = 5
"""Of the tokens, as many as tell what is meant."""


async def check_same(client: Client, tokenizer: Tokenizer, dialect: Dialect) -> None:
    """Raise ModelError if the server tokenises plain words otherwise. One that does not tokenise is believed."""
    llama_cpp = dialect is Dialect.LLAMA_CPP
    body = tokenize_body(TEXT, False, llama_cpp=llama_cpp)
    theirs = read_tokens(await client.post_once("/tokenize", body, named=not llama_cpp) or {})
    (ours,) = await tokenizer.encode([(TEXT, False)])
    if theirs is not None and theirs != ours:
        raise ModelError(
            f"the tokenizer is not that of the model which the server has: {_difference(ours, theirs)}",
            hint="set `tokenizer:` of the model to a directory with the served model's own tokenizer.json",
        )


def _difference(ours: list[int], theirs: list[int]) -> str:
    differing = (i for i, (here, there) in enumerate(zip(ours, theirs, strict=False)) if here != there)
    at = next(differing, min(len(ours), len(theirs)))
    few = slice(at, at + SHOWN)
    return (
        f"{TEXT!r} is {len(ours)} tokens here and {len(theirs)} there, from number {at + 1} on "
        f"{ours[few]} here and {theirs[few]} there"
    )
