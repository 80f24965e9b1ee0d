"""The errors a user can cause. Each message says what was expected, what came, and the fix.

The command line turns every `Sa2jaxError` into one line on stderr and exit code 2.
"""

MAX_MESSAGE = 480  # characters of an error: the line with what stands before it has less than 500


class Sa2jaxError(Exception):
    """Base of all errors that sa2jax raises for a user's mistake."""

    def __str__(self) -> str:
        return shorten(super().__str__())


class FileError(Sa2jaxError):
    """A file, or a text, that cannot be read as what it should be.

    Args:
        where: the file's name, or what else to call it.
        reason: what is wrong with it.
    """

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)
        self.where, self.reason = where, shorten(reason, MAX_MESSAGE // 2)

    def __str__(self) -> str:
        return shorten(f"{self.where}: {self.reason}")


class MissingFileError(FileError):
    """A file that is not there."""


class ConfigError(Sa2jaxError):
    """A model configuration that cannot be understood."""


class CheckpointError(Sa2jaxError):
    """A checkpoint folder that is damaged, incomplete or of another model."""


class AudioError(Sa2jaxError):
    """Audio that cannot be read or holds no usable samples."""


class VoiceError(Sa2jaxError):
    """A voice that is missing, cannot be used, or belongs to another checkpoint."""


class CodeError(Sa2jaxError):
    """Audio codes that no recording has."""


class TokenizerError(Sa2jaxError):
    """A tokenizer that is missing or is not a Step-Audio 2 tokenizer."""


class PromptError(Sa2jaxError):
    """A prompt that cannot be built or does not fit the model's context."""


class ShardingError(Sa2jaxError):
    """A device mesh that does not fit the devices at hand."""


class PlanError(Sa2jaxError):
    """A plan for hardware that is unknown, or that cannot be made here."""


class TrainError(Sa2jaxError):
    """A training that cannot be set up as asked."""


class DataError(TrainError):
    """Training data that cannot be read or used."""


def reason_of(error: Exception) -> str:
    """What an error says is wrong, without the name of the file that a message begins with."""
    return error.reason if isinstance(error, FileError) else str(error)


def shorten(text: str, size: int = MAX_MESSAGE) -> str:
    """A text of at most so many characters: of a longer one the beginning and the end.

    The end is where messages say what to do.
    """
    if len(text) <= size:
        return text
    last = size // 3
    return f"{text[: size - last - 3]} … {text[-last:]}"
