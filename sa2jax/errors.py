"""The errors a user can cause. Each message says what was expected, what came, and the fix.

The command line turns every `Sa2jaxError` into one line on stderr and exit code 2.
"""


class Sa2jaxError(Exception):
    """Base of all errors that sa2jax raises for a user's mistake."""


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
