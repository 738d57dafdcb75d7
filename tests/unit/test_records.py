"""The frozen values: what is made quickly is what `dataclass` would have made."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from proctor.infer.engine import PhysicalRequest
from proctor.records import Kind, Message, Request, Response, quickly

REQUEST = {"kind": Kind.GENERATE, "messages": (Message(role="user", content="hi"),), "arguments": '{"until":[]}'}
MADE = [
    (Message, {"role": "user", "content": "hi"}),
    (Request, REQUEST),
    (Response, {"key": "k", "physical_key": "p", "text": "t", "token_ids": (1, 2)}),
    (PhysicalRequest, {"key": "k", "physical_key": "p", "kind": Kind.GENERATE, "request": Request(**REQUEST)}),
]


@pytest.mark.parametrize(("cls", "given"), MADE)
def test_what_is_made_quickly_is_the_same(cls: type[Any], given: dict[str, Any]) -> None:
    made, usual = quickly(cls)(**given), cls(**given)
    assert type(made) is cls
    assert (made, hash(made), repr(made)) == (usual, hash(usual), repr(usual))
    for other in (copy.copy(made), pickle.loads(pickle.dumps(made)), replace(made)):
        assert type(other) is cls
        assert other == usual


@pytest.mark.parametrize(("cls", "given"), MADE)
def test_what_is_made_quickly_is_frozen_and_checked(cls: type[Any], given: dict[str, Any]) -> None:
    make = quickly(cls)
    name = next(iter(given))
    with pytest.raises(FrozenInstanceError):
        setattr(make(**given), name, "other")
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        make(**given, nothing=1)
    with pytest.raises(TypeError, match=f"missing .*'{name}'"):
        make(**{k: v for k, v in given.items() if k != name})


def test_a_request_survives_its_own_json() -> None:
    request = Request(**REQUEST, sample_index=3)
    assert Request.from_json(request.to_json()) == request
    with pytest.raises(TypeError, match="unexpected"):
        Request.from_json(request.to_json() | {"later": 1})
