"""Settings of the language model's data that cannot be are refused by name."""

import pytest

from sa2jax.errors import DataError
from sa2jax.train.language.data_config import DataConfig


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sources": {}}, "expected one or more sources"),
        ({"sources": {"a": 0}}, "each with a weight above 0"),
        ({"sources": {"a": 1, "b": float("inf")}}, "each with a weight above 0"),
        ({"length": 1}, "length=1: expected at least 2"),
        ({"rows": 0}, "rows=0: expected at least 1"),
        ({"accumulation_steps": -1}, "accumulation_steps=-1"),
        (
            {"rows": 3, "accumulation_steps": 2},
            "rows=3: expected a multiple of accumulation_steps=2",
        ),
        ({"workers": -1}, "workers=-1"),
        ({"max_rejects": -1}, "max_rejects=-1"),
        ({"epochs": 0}, "epochs=0: expected at least 1, or None"),
        ({"prompt_style": "cooked"}, "prompt_style='cooked': expected one of chat, base"),
        ({"loss_weights": {"speech": 1}}, "expected numbers from 0 for text, audio, pads"),
        ({"loss_weights": {"text": -1}}, "expected numbers from 0 for"),
        ({"mel_frames": 1001}, "mel_frames=1001: expected a multiple of 8"),
    ],
)
def test_settings_that_cannot_be(changes, reason):
    with pytest.raises(DataError, match=reason):
        DataConfig(**{"sources": {"a": 1.0}, **changes})
