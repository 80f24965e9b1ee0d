from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from sa2jax.evaluate.scores import Metric, Scores, bootstrap, print_scores, wilson

RATE = Metric(key="sums", title="sums", unit="%", threshold=85, target=97)
WER = Metric(key="seen", title="WER", unit="%", threshold=8, target=3, lower_is_better=True)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (3, 4, 0.3006, 0.9544), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_has_the_published_bounds(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_covers_what_it_says(rng):
    held = 0
    for right in rng.binomial(50, 0.9, 2000):
        low, high = wilson(int(right), 50)
        held += low <= 0.9 <= high
    assert 0.92 < held / 2000 < 0.98


def test_no_interval_of_nothing():
    with pytest.raises(ValueError, match="n > 0"):
        wilson(0, 0)


def test_words_of_one_recording_go_wrong_together():
    words = [10] * 40
    spread = bootstrap([1] * 40, words)
    lumped = bootstrap([10] * 4 + [0] * 36, words)
    assert spread == pytest.approx((0.1, 0.1))
    assert lumped[0] < 0.04
    assert lumped[1] > 0.17
    assert lumped == bootstrap([10] * 4 + [0] * 36, words)


@pytest.mark.parametrize(
    ("metric", "value", "verdict"),
    [
        (RATE, 97, "target"),
        (RATE, 96.9, "threshold"),
        (RATE, 85, "threshold"),
        (RATE, 84.9, "below"),
        (WER, 3, "target"),
        (WER, 3.1, "threshold"),
        (WER, 8, "threshold"),
        (WER, 8.1, "below"),
        (RATE, None, "not measured"),
        (RATE, 0, "below"),
        (WER, 0, "target"),
    ],
)
def test_verdicts(metric, value, verdict):
    assert metric.not_measured("why").verdict == "not measured"
    found = metric if value is None else metric.measured(value, 1)
    assert found.verdict == verdict


def test_a_row_without_items_is_no_figure():
    assert RATE.accuracy([]).value is None
    assert WER.word_error_rate([], []).verdict == "not measured"
    assert RATE.accuracy([True, True, True, False]).value == 75


def test_the_table_shows_every_row_and_note():
    below = RATE.accuracy([True, False], "by a judge [not markup]")
    missing = WER.not_measured("no recordings")
    scores = Scores(title="nano", metrics=(below, missing), metadata={"seed": 0})
    out = StringIO()
    print_scores(scores, Console(file=out, width=150))
    text = out.getvalue()
    assert "50.0 %" in text
    assert "9.5–90.5" in text
    assert "below" in text
    assert "sums: by a judge [not markup]" in text
    assert "seen: not measured: no recordings" in text
    assert scores.below_threshold == ("sums",)
    assert scores["seen"] is missing
    metric = scores.to_dict()["metrics"][0]
    assert (metric["value"], metric["verdict"]) == (50, "below")
    assert np.allclose(metric["interval"], (9.453, 90.547), atol=1e-3)
