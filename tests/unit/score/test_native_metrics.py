"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.score import metrics
from proctor.score.metrics import Ignoring
from proctor.stats.bootstrap import bootstrap
from proctor.stats.intervals import mean_stderr

EXACT = Ignoring()
LOOSE = Ignoring(case=True, punctuation=True, whitespace=True)


def test_choose_takes_the_first_of_equals() -> None:
    assert metrics.choose([-2.0, -1.0, -1.0]) == 1


def test_normalised_by_characters_not_bytes() -> None:
    # Per character: -4/4 = -1 for éééé; -3/2 = -1.5 for ab. Per byte éééé would have -0.5, and ab still -1.5.
    assert metrics.choose([-4.0, -3.0]) == 1
    assert metrics.choose_normalised([-4.0, -3.0], ["éééé", "ab"]) == 0
    # -8/4 = -2 against -1.5; by bytes it would be -1.
    assert metrics.choose_normalised([-8.0, -3.0], ["éééé", "ab"]) == 1


@pytest.mark.parametrize(
    ("answer", "ignoring", "value"),
    [
        ("Paris", EXACT, 1.0),
        ("paris", EXACT, 0.0),
        ("paris", Ignoring(case=True), 1.0),
        ("Paris.", EXACT, 0.0),
        ("Paris.", Ignoring(punctuation=True), 1.0),
        (" Paris\n", EXACT, 0.0),
        (" Paris\n", Ignoring(whitespace=True), 1.0),
        ("«PARIS» !", LOOSE, 0.0),  # guillemets are not ASCII punctuation
        ("\t PARIS ! ", LOOSE, 1.0),
        ("Lutetia", EXACT, 1.0),
    ],
)
def test_exact_match(answer: str, ignoring: Ignoring, value: float) -> None:
    assert metrics.exact_match(answer, ["Paris", "Lutetia"], ignoring) == value


def test_contains() -> None:
    assert metrics.contains("It is Paris, of course", ["Rome", "Paris"], EXACT) == 1.0
    assert metrics.contains("It is paris", ["Paris"], EXACT) == 0.0
    assert metrics.contains("anything", ["?!"], LOOSE) == 0.0, "a reference that vanishes is not found everywhere"


def test_regex() -> None:
    assert metrics.regex_found("the answer is 42.", [r"\b4\d\b"]) == 1.0
    assert metrics.regex_found("the answer is 142.", [r"\b4\d\b", "none"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("the cat sat", "a cat sat down", 0.8),  # 2 in common: P = 2/2, R = 2/3
        ("The Cat!", "cat", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("b b b", "b b c", 2 / 3),  # counted with multiplicity: P = R = 2/3
    ],
)
def test_f1(answer: str, reference: str, value: float) -> None:
    assert metrics.token_f1(answer, ["zzz", reference]) == pytest.approx(value)


def test_counts_as_lm_eval_does() -> None:
    assert metrics.count_words(" two  words\n") == 4  # an empty piece before and one after
    assert metrics.count_bytes("é€") == 5


def test_perplexities_by_hand() -> None:
    # Σl = -6 over 3 words: e². In bits for 4 bytes: 6/4/ln 2.
    assert metrics.perplexity_figure([-2.0, -4.0], [1, 2]).value == pytest.approx(math.exp(2))
    assert metrics.bits_figure([-2.0, -4.0], [2, 2]).value == pytest.approx(1.5 / math.log(2))
    # Each document at the same rate: nothing varies.
    assert metrics.perplexity_figure([-2.0, -4.0], [1, 2]).stderr == pytest.approx(0.0)


def test_ratio_stderr_by_hand() -> None:
    # r = -6/4; residuals -2+3 and -4+3 of weights 2, 2: 1, 1; √(2/1·2)/4 = 0.5.
    assert metrics.ratio_stderr([-2.0, -4.0], [2, 2]) == pytest.approx(0.5)
    figure = metrics.perplexity_figure([-2.0, -4.0], [2, 2])
    assert figure.stderr == pytest.approx(0.5 * math.exp(1.5))
    assert metrics.bits_figure([-2.0, -4.0], [2, 2]).stderr == pytest.approx(0.5 / math.log(2))
    assert metrics.ratio_stderr([-2.0], [2]) is None


def test_ratio_stderr_is_what_the_bootstrap_finds() -> None:
    generator = np.random.default_rng(1)
    weights = generator.integers(20, 200, size=300)
    logprobs = -weights * generator.uniform(0.5, 1.5, size=300)
    figure = metrics.perplexity_figure(logprobs.tolist(), weights.tolist())
    drawn = bootstrap(
        lambda x: float(np.exp(-x[:, 0].sum() / x[:, 1].sum())),
        np.stack([logprobs, weights], 1).tolist(),
        iterations=2000,
    )
    assert drawn is not None
    assert figure.stderr == pytest.approx(drawn.stderr, rel=0.06)


@given(st.lists(st.floats(-100, 0), min_size=2, max_size=40))
def test_ratio_of_equal_weights_is_a_mean(values: list[float]) -> None:
    assert metrics.ratio_stderr(values, [1] * len(values)) == pytest.approx(mean_stderr(values), abs=1e-9)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_mean_figure_agrees_with_stats(values: list[float]) -> None:
    assert metrics.mean_figure(values).stderr == pytest.approx(mean_stderr(values), abs=1e-9)


def test_nothing_gives_nothing_and_infinity_is_said() -> None:
    for figure in (metrics.mean_figure([]), metrics.perplexity_figure([], []), metrics.bits_figure([], [])):
        assert figure.value is None and figure.stderr is None
    endless = metrics.perplexity_figure([-2000.0, -1.0], [1, 1])
    assert endless.value == math.inf and endless.stderr is None
