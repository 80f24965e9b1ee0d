"""A long recording in chunks that the model hears one by one."""

import numpy as np
from jaxtyping import Float

from sa2jax.audio.features import CHUNK_SAMPLES
from sa2jax.errors import AudioError


def split_chunks(
    samples: Float[np.ndarray, " T"], chunk: int = CHUNK_SAMPLES
) -> list[Float[np.ndarray, " T"]]:
    """Cut a recording into views of `chunk` samples (25 s at 16 kHz); the last one is shorter.

    There is no limit on the length. The model hears every chunk as a clip of its own.

    Raises:
        AudioError: not one channel, no samples, or a chunk below one sample.
    """
    if samples.ndim != 1 or samples.size == 0 or chunk < 1:
        raise AudioError(
            f"expected samples [T] with T >= 1 and chunk >= 1, got shape {samples.shape} and chunk "
            f"{chunk}; read the audio with load_audio()"
        )
    return [samples[start : start + chunk] for start in range(0, samples.size, chunk)]
