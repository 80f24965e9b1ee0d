"""Settings of a server: keys, bounds and defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sa2jax.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server allows, and what a request gets that does not say.

    Attributes:
        model_id: what clients call the model.
        api_keys: keys that open the server; none: it is open to whoever reaches it.
        public_operations: whether /health, /readyz, /metrics and their like need no key.
        allowed_origins: origins whose pages may use the server from a browser, `*` for all; its own
            page always may.
        local_only: whether it is meant for this machine alone; without keys, requests that name
            another host are refused then.
        rows: requests that run at the same time.
        queue: requests that may wait for that, in order of arrival.
        queue_timeout: seconds that one waits at most.
        max_json_bytes: size of a JSON body; recordings in it are base64, which adds a third.
        max_upload_bytes: size of a body with files.
        max_seconds: longest recording that a conversation hears.
        max_transcribed_seconds: longest recording that is transcribed or translated.
        max_input_chars: longest text that is read aloud.
        max_samples: most answers to one request (`n`).
        max_len: positions of a conversation, prompt and answer together; None for the model's.
        default_system: system prompt of a conversation that brings none; None for none.
        think: whether a Think model thinks where the request does not say.
        first_codes: codes (25 a second) of a stream's first chunk of sound.
        chunk_codes: codes of the others.
        queued_pieces: pieces of an answer that are held for a client who reads slowly; then the
            answer pauses.
        reader_timeout: seconds after which a client who reads nothing is given up.
        voices: folder of voices that clients add; None: they may add none.
        max_voices: how many these may be.
        max_voice_bytes: size of the recording of one.
        voice_aliases: other names of voices, such as those that clients cannot be told to change.
        reply_seconds: how long the ids of a spoken answer are kept for `assistant.audio.id`.
        max_replies: how many of them.
        grace: seconds that answers under way may take when the server shuts down.
    """

    model_id: str = "step-audio-2"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    public_operations: bool = True
    allowed_origins: tuple[str, ...] = ()
    local_only: bool = False
    rows: int = 8
    queue: int = 32
    queue_timeout: float = 60.0
    max_json_bytes: int = 64 * MIB
    max_upload_bytes: int = 2048 * MIB
    max_seconds: float = 600.0
    max_transcribed_seconds: float = 86_400.0
    max_input_chars: int = 4096
    max_samples: int = 8
    max_len: int | None = None
    default_system: str | None = "You are a helpful assistant."
    think: bool = False
    first_codes: int = 10
    chunk_codes: int = 25
    queued_pieces: int = 32
    reader_timeout: float = 120.0
    voices: Path | None = None
    max_voices: int = 1000
    max_voice_bytes: int = 10 * MIB
    voice_aliases: Mapping[str, str] = field(default_factory=dict)
    reply_seconds: float = 3600.0
    max_replies: int = 10_000
    grace: float = 30.0

    def __post_init__(self):
        for name in ("rows", "max_samples", "first_codes", "chunk_codes", "queued_pieces"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in (
            "queue",
            "queue_timeout",
            "reader_timeout",
            "grace",
            "max_voices",
            "max_replies",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 0")
        if not all(key and key.isascii() and key.isprintable() for key in self.api_keys):
            raise ConfigError("an API key: expected printable ASCII characters, at least one")
