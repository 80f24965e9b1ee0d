"""What a session asks to be done outside of it."""

from dataclasses import dataclass

from sa2jax.audio.recording import Recording
from sa2jax.serve.realtime.responder import ResponseRequest
from sa2jax.serve.realtime.session_config import Transcription


@dataclass(frozen=True)
class StartResponse:
    """Begin a response."""

    request: ResponseRequest


@dataclass(frozen=True)
class CancelResponse:
    """End a response, of which so many seconds of sound have gone to the client."""

    response_id: str
    sent: float


@dataclass(frozen=True, eq=False)
class Transcribe:
    """Transcribe a turn of the user, when nothing more urgent is to be done."""

    item_id: str
    recording: Recording
    transcription: Transcription


Action = StartResponse | CancelResponse | Transcribe
