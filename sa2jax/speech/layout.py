"""Layout of a detokenizer and its voices on disk.

A model folder of this library holds

    token2wav/sa2jax.json   sizes, and the hash of the weights that analyse voices
    token2wav/params/       flow, vocoder, speech_tokenizer, speaker_encoder
    voices/NAME.safetensors

A detokenizer alone has the contents of token2wav/ and voices/ in one folder. The released folder,
with flow.yaml and its four weight files, works as it is: it is converted in memory, and its voices
are the recordings in assets/.
"""

from pathlib import Path

from sa2jax import checkpoint

KIND = "token2wav"
YAML = "flow.yaml"
VOICES, RECORDINGS = "voices", "assets"
SYNTHESIS, ANALYSIS = ("flow", "vocoder"), ("speech_tokenizer", "speaker_encoder")
DEFAULT_VOICE = "default_voice"  # in a folder's metadata: the name of one of its voices
DEFAULTS = ("default", "default_female", "default_male")  # what voice "default" stands for


def is_official(folder: str | Path) -> bool:
    """Whether a folder holds a detokenizer as released."""
    return (Path(folder) / YAML).is_file() and not checkpoint.is_checkpoint(folder)


def is_converted(folder: str | Path) -> bool:
    """Whether a folder holds a converted detokenizer."""
    return checkpoint.is_checkpoint(folder) and checkpoint.read_info(folder).get("kind") == KIND


def find(home: str | Path) -> Path | None:
    """The detokenizer's folder, released or converted: in a model's folder, or that folder."""
    home = Path(home)
    choices = (home / KIND, home)
    return next((choice for choice in choices if is_official(choice) or is_converted(choice)), None)
