"""The model folder that data is prepared for: its mel bands, tokenizer and speech tokenizer.

Data of the language model: samples in shards, packed into rows (`language.data`). Single networks
have another system, prepared folders of clips in batches of like length: `data.recordings`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from sa2jax.assets import model_folder
from sa2jax.audio import Channel
from sa2jax.chat.tokenizer import NUM_CODES, Tokenizer
from sa2jax.config import StepAudio2Config
from sa2jax.errors import CheckpointError
from sa2jax.train.data.samples import N_MELS


@dataclass(frozen=True)
class FeatureSpec:
    """What workers know of the model.

    Attributes:
        n_mels: mel bands.
        num_codes: audio codes that its tokenizer has.
        speaks: whether it has a speech tokenizer.
        channel: which channel of a recording is heard, see `audio.AudioSource`.
    """

    n_mels: int = N_MELS
    num_codes: int = NUM_CODES
    speaks: bool = False
    channel: Channel | None = None


class ModelFolder:
    """What a model folder says about its data; see `open`."""

    def __init__(
        self,
        plan: FeatureSpec,
        reader: tuple[Tokenizer, StepAudio2Config] | None = None,
        speech: Any = None,
    ):
        self.plan, self.reader, self._speech = plan, reader, speech
        self.analysis_hash: str | None = None  # known once codes have been made

    @classmethod
    def open(cls, folder: str | Path | None) -> Self:
        """Look at a folder; weights are not read before they are needed."""
        if folder is None:
            return cls(FeatureSpec())
        from sa2jax.families import family_of, read_config
        from sa2jax.speech.layout import find
        from sa2jax.speech.store import SpeechFolder

        folder = model_folder(folder)
        if not folder.is_dir():
            raise CheckpointError(f"no folder {folder}: expected a model folder")
        n_mels, num_codes, reader = N_MELS, NUM_CODES, None
        if (folder / "config.json").is_file():
            cfg = read_config(folder)
            tokenizer = Tokenizer.from_folder(folder, family_of(cfg).special_tokens)
            n_mels, num_codes = cfg.audio_encoder.mels, tokenizer.special.num_codes
            reader = tokenizer, cfg
        speech = None if find(folder) is None else SpeechFolder(folder)
        if reader is None and speech is None:
            raise CheckpointError(f"{folder} holds no model: expected config.json or token2wav/")
        return cls(FeatureSpec(n_mels, num_codes, speech is not None), reader, speech)

    def codes_of(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        """Codes of recordings at 16 kHz."""
        if self.analysis_hash is None:
            from sa2jax.runtime import enable_compilation_cache

            enable_compilation_cache()
            self.analysis_hash = self._speech.analysis_hash
        return self._speech.analyzer.codes_of(clips)
