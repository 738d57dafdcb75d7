"""What is made once for equal neighbours."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, replace

import orjson

from proctor.infer.engine import Sampling
from proctor.infer.latest import Latest
from proctor.infer.profiles import generation_key


def test_it_is_made_anew_for_another_object_only() -> None:
    made: list[str] = []
    latest = Latest(lambda given: made.append(given) or len(made))
    one, equal = "".join(["a", "b"]), "".join(["a", "b"])
    assert [latest(one), latest(one), latest(equal), latest(one)] == [1, 1, 2, 3]


def test_who_is_given_something_else_meanwhile_gets_its_own() -> None:
    def make(given: str) -> str:
        if given == "outer":
            latest("inner")  # as another thread would
        return given.upper()

    latest = Latest(make)
    assert [latest("outer"), latest("inner"), latest("outer")] == ["OUTER", "INNER", "OUTER"]


def test_a_generations_key_is_of_all_that_is_sent_whatever_was_asked_before() -> None:
    greedy = Sampling(max_tokens=5, stop=("\n",), extra='{"a":1}')
    sampled = replace(greedy, temperature=0.5, seed=7)
    for sampling, sample in ((greedy, None), (sampled, (0, 1)), (greedy, None)):
        # The fields of `Sampling`, in its own order but for the extra ones, are what was hashed ever since.
        whole = orjson.dumps(["generate_until", [1, 2], list(astuple(sampling)), sample])
        assert generation_key([1, 2], sampling, sample=sample) == hashlib.sha256(whole).hexdigest()
