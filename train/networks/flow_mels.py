"""Mel frames predicted by a flow from a recording's codes, to fine-tune a vocoder on.

Data of single networks: prepared folders of clips, in batches of like length. The language model
has another system, samples in shards that are packed into rows: `data.samples`, `language.data`.

    maker = FlowMelSynthesizer("runs/flow/model")
    mels = maker.synthesize([sound], [maker.speaker_vector("a.wav")])

A flow that has not learnt everything leaves fine lines of the spectrum out, pitch among them. A
vocoder that knows true mel frames alone whispers then; one that has heard the flow's does not.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int16

from sa2jax import audio
from sa2jax.speech.layout import SYNTHESIS
from sa2jax.speech.store import SpeechFolder
from sa2jax.speech.token2wav import Token2Wav
from sa2jax.train.networks.flow_data import speaker_vector

_ROWS = 16  # of the flow's batches


class FlowMelSynthesizer:
    """A detokenizer that hears recordings and says them again.

    Args:
        model: folder with the detokenizer.
        channel: which channel of a recording tells who speaks, see `audio.AudioSource`.

    Raises:
        CheckpointError: if it has none.
    """

    def __init__(self, model: str | Path, channel: audio.Channel | None = None):
        folder = SpeechFolder(model)
        self._analyzer = folder.analyzer
        self._talker = Token2Wav(folder.cfg, folder.params(SYNTHESIS), batch_size=_ROWS)
        self._identify = lru_cache(64)(lambda path: speaker_vector(self._analyzer, path, channel))
        self._calls = 0

    def speaker_vector(self, path: str) -> Float[np.ndarray, "C"]:
        """Who speaks in a recording, see `flow_data.speaker_vector`."""
        return self._identify(path)

    def synthesize(
        self,
        sounds: Sequence[Int16[np.ndarray, "N"]],
        speakers: Sequence[Float[np.ndarray, "C"]],
    ) -> list[Float[np.ndarray, "T M"]]:
        """Log-mel frames (50 Hz), two for each code of a sound; noise is drawn anew in each call.

        No recording is given as a prompt: the frames would be copied from it.

        Args:
            sounds: samples at 24 kHz.
            speakers: a vector for each.
        """
        rate = self._talker.sample_rate
        low = [
            audio.resample(sound / np.float32(32768), rate, audio.SAMPLE_RATE) for sound in sounds
        ]
        codes = self._analyzer.codes_of(low)
        self._calls += 1
        return self._talker.mels(codes, speakers, seed=self._calls)
