"""`/v1/audio/voices`: voices that clients add, list and remove."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request

from sa2jax.serve.bodies import form_file, form_values, read_form
from sa2jax.serve.errors import ApiError
from sa2jax.serve.recordings import open_recording
from sa2jax.serve.settings import MIB
from sa2jax.serve.state import state_of
from sa2jax.serve.voices import AddedVoice

router = APIRouter()
_LONGEST = 600.0  # s of a recording; of a longer one than 30 s the beginning is used


@router.get("/v1/audio/voices")
async def list_voices(request: Request) -> dict[str, Any]:
    """All voices: `data` as OpenAI's clients read them, `voices` as others do."""
    state = state_of(request)
    names, added = await state.bridge.call(lambda: (state.voices.names, state.voices.added))
    by_name = {voice.name: voice for voice in added}
    return {
        "object": "list",
        "data": [_voice(name, by_name) for name in names],
        "has_more": False,
        "voices": names,
        "uploaded_voices": [_uploaded(voice) for voice in added],
    }


@router.post("/v1/audio/voices")
async def add_voice(request: Request) -> dict[str, Any]:
    """Make a voice of a recording of 1 to 30 s."""
    state = state_of(request)
    state.admission.require_room()
    async with read_form(request) as form:
        fields = form_values(form)
        name = fields.get("name", "")
        part = "audio_sample" if "audio_sample" in form else "file"
        upload = form_file(form, part)
        if fields.get("type", "audio_sample") != "audio_sample":
            raise ApiError("type: expected audio_sample", param="type")
        if (upload.size or 0) > state.settings.max_voice_bytes:
            most = f"{state.settings.max_voice_bytes / MIB:g} MiB"
            raise ApiError(f"{part}: expected at most {most}", 413, param=part)
        with await state.admission.acquire():
            added = await state.bridge.call(
                lambda: state.voices.add(
                    name,
                    open_recording(
                        upload.file, upload.filename or "the recording", max_seconds=_LONGEST
                    ),
                )
            )
    return _voice(added.name, {added.name: added})


@router.get("/v1/audio/voices/{name}")
async def show_voice(name: str, request: Request) -> dict[str, Any]:
    """One voice."""
    state = state_of(request)
    names, added = await state.bridge.call(lambda: (state.voices.names, state.voices.added))
    for known in (name, name.removeprefix("voice_")):
        if known in names:
            return _voice(known, {voice.name: voice for voice in added})
    raise ApiError(f"no voice {name!r:.80}", 404, param="name", code="voice_not_found")


@router.delete("/v1/audio/voices/{name}")
async def remove_voice(name: str, request: Request) -> dict[str, Any]:
    """Forget a voice that was added."""
    state = state_of(request)
    removed = await state.bridge.call(state.voices.remove, name)
    identity = f"voice_{removed}"
    return {"id": identity, "name": removed, "object": "audio.voice.deleted", "deleted": True}


def _voice(name: str, added: Mapping[str, AddedVoice]) -> dict[str, Any]:
    voice = added.get(name)
    return {
        "id": name if voice is None else voice.id,
        "object": "audio.voice",
        "name": name,
        "created_at": 0 if voice is None else voice.created_at,
        "type": "audio_sample",
    }


def _uploaded(voice: AddedVoice) -> dict[str, Any]:
    return {
        "name": voice.name,
        "consent": None,  # not kept
        "created_at": voice.created_at,
        "file_size": voice.size,
        "mime_type": "application/octet-stream",
    }
