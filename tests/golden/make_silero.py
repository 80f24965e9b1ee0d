"""Records the probabilities of speech that Silero's own network gives.

    PYTHONPATH=.:tests python tests/golden/make_silero.py     # needs silero-vad and onnxruntime

Made with silero-vad 6.2.3 (silero_vad_16k_op15.onnx) and onnxruntime 1.32.0 on the sounds of
`helpers/silero.py`.
"""

import numpy as np
from helpers.silero import GOLDEN, original, released, sounds

if __name__ == "__main__":
    onnx = released()
    assert onnx is not None, 'pip install "sa2jax[parity]"'
    heard = original(onnx)
    found = {name: heard(samples) for name, samples in sounds().items()}
    np.savez_compressed(GOLDEN / "silero_vad.npz", **found)
