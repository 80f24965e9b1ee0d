"""Create a randomly initialised model folder, the start of training from scratch.

    init_model("nano", "runs/nano/begin", texts=["corpus/talks"], seed=0)

Sizes come from `configs/models` and `configs/token2wav`; the tokenizer's merges are learnt from the
texts of data files, as many as the vocabulary has room for.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from sa2jax import atomic_io
from sa2jax.chat.tokenizer_files import BYTES, SPECIAL, describe, learn_merges, save_files
from sa2jax.config import StepAudio2Config
from sa2jax.errors import DataError, FileError, TrainError, reason_of
from sa2jax.files.json_files import parse_json
from sa2jax.files.rows import read_rows
from sa2jax.nn import Params
from sa2jax.speech.layout import KIND as SPEECH
from sa2jax.speech_config import Token2WavConfig
from sa2jax.train.data.row_forms import RecordError, standard_row
from sa2jax.train.data.samples import jsonl_files
from sa2jax.train.language.model_io import open_base_model
from sa2jax.train.language.recipe import ModelSpec
from sa2jax.train.networks.audio_encoder import init_audio_encoder
from sa2jax.train.networks.flow import init_flow
from sa2jax.train.networks.model_io import save_detokenizer
from sa2jax.train.networks.speaker_encoder import init_speaker_encoder
from sa2jax.train.networks.speech_tokenizer import init_speech_tokenizer
from sa2jax.train.networks.vocoder import init_vocoder


def init_model(
    preset: str,
    out: str | Path,
    *,
    texts: Sequence[str | Path],
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Make a model folder with a language model, its tokenizer and a detokenizer, all fresh.

    Args:
        preset: name of sizes that both `configs/models` and `configs/token2wav` have.
        out: folder to make; it appears only when it is complete.
        texts: data files (.jsonl) or folders of them, from whose texts the tokenizer learns.
        seed: of all numbers.
        overwrite: replace a checkpoint at `out`.

    Returns:
        The folder.

    Raises:
        ConfigError: if there is no such preset.
        DataError: if the texts cannot be read.
        TokenizerError: if they are too few for the vocabulary.
        TrainError: if the vocabulary has no room for the audio codes.
        CheckpointError: if `out` cannot be made.
    """
    cfg, speech = StepAudio2Config.preset(preset), Token2WavConfig.preset(preset)
    codes = speech.flow.codes
    merges = cfg.decoder.vocab - BYTES - len(SPECIAL) - codes
    if merges < 0:
        raise TrainError(
            f"{preset}: a vocabulary of {cfg.decoder.vocab} has no room for {BYTES} bytes, "
            f"{len(SPECIAL)} special tokens and {codes} audio codes"
        )
    out = Path(out)
    with TemporaryDirectory() as scratch:
        words = learn_merges(_texts(texts), merges)
        save_files(scratch, describe(codes, merges=words))
        base = open_base_model(ModelSpec(preset=preset, tokenizer=scratch))
        with atomic_io.new_folder(out, overwrite=overwrite, sources=texts) as folder:
            params = base.load_params(None, seed)
            encoder = init_audio_encoder(cfg.audio_encoder, seed=seed)["model"]
            base.write_into(folder, params | {"audio_encoder": encoder})
            save_detokenizer(folder / SPEECH, speech, init_networks(speech, seed))
    return out


def init_networks(cfg: Token2WavConfig, seed: int) -> dict[str, Params]:
    """Numbers for all networks of a detokenizer before any training."""
    return {
        "flow": init_flow(cfg.flow, seed),
        "vocoder": init_vocoder(cfg.vocoder, seed),
        "speech_tokenizer": init_speech_tokenizer(cfg.speech_tokenizer, seed=seed)["model"],
        "speaker_encoder": init_speaker_encoder(cfg.speaker_encoder, speakers=1, seed=seed)[
            "model"
        ],
    }


def _texts(sources: Sequence[str | Path]) -> Iterator[str]:
    """What all turns of data files say."""
    for path in (file for source in sources for file in jsonl_files(Path(source))):
        for place, row in read_rows(path):
            try:
                for message in standard_row(parse_json(row, dict)).messages:
                    yield str(message["role"]) + "\n" + str(message.get("content") or "")
            except RecordError as error:
                raise DataError(f"{path}{place}: {error}") from None
            except (FileError, ValueError, KeyError, TypeError, AttributeError) as error:
                got = f"{type(error).__name__}: {reason_of(error)}"
                raise DataError(
                    f"{path}{place}: expected a record with messages, got {got}"
                ) from None
