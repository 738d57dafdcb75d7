"""Documents survive the way through JSON with their types."""

from __future__ import annotations

import datetime
import decimal
import uuid
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.catalog.lm_eval import documents

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.datetimes(),
    st.dates(),
    st.times(),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.timedeltas(),
    st.complex_numbers(allow_nan=False),
)
KEYS = st.one_of(st.text(), st.integers(), st.just(documents.TAG), st.tuples(st.integers(), st.text()))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner), st.frozensets(st.integers())
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal in value and, all the way down, in type."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@given(VALUES)
def test_values_come_back_with_their_types(value: Any) -> None:
    assert same(documents.load(documents.dump(value)), value)


@pytest.mark.parametrize(
    "value",
    [np.float32(0.1), np.float64(1 / 3), np.int16(-7), np.bool_(True), np.str_("ü")],
    ids=lambda v: type(v).__name__,
)
def test_numpy_scalars_come_back(value: Any) -> None:
    back = documents.load(documents.dump({"v": value}))["v"]
    assert type(back) is type(value)
    assert back == value


def test_numpy_arrays_come_back() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3) / 7
    back = documents.load(documents.dump(value))
    assert back.dtype == value.dtype
    assert np.array_equal(back, value)


def test_each_load_gives_a_fresh_document() -> None:
    text = documents.dump({"choices": ["a"]})
    documents.load(text)["choices"].append("b")
    assert documents.load(text) == {"choices": ["a"]}


def test_text_that_is_no_unicode_is_kept() -> None:
    assert documents.load(documents.dump("\ud800 x")) == "\ud800 x"


def test_what_cannot_be_kept_is_refused_with_its_place() -> None:
    class Image:
        pass

    with pytest.raises(documents.Unkept, match=r"document\['pages'\]\[1\] is a .*Image"):
        documents.dump({"pages": [1, Image()]})


def test_subclasses_are_not_flattened_silently() -> None:
    class Special(dict[str, int]):
        pass

    with pytest.raises(documents.Unkept):
        documents.dump(Special(a=1))


def test_examples_of_tagged_values_are_what_json_says() -> None:
    values = [b"x", datetime.date(2026, 1, 2), decimal.Decimal("1.50"), uuid.UUID(int=1), (1,)]
    assert [documents.encode(v)[documents.TAG][0] for v in values] == ["bytes", "date", "decimal", "uuid", "tuple"]
