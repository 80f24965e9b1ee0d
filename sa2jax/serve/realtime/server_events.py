"""Events of the server, as JSON objects; each has an `event_id` of its own."""

from typing import Any

from sa2jax.serve.realtime.checks import EventError
from sa2jax.serve.realtime.items import Item, new_id
from sa2jax.serve.realtime.responder import Usage

Event = dict[str, Any]


def event(type: str, **fields: Any) -> Event:
    """An event of a type."""
    return {"type": type, "event_id": new_id("event"), **fields}


def error_event(error: EventError) -> Event:
    """`error`: an event of the client was refused; the session goes on."""
    return event(
        "error",
        error={
            "type": error.type,
            "code": error.code,
            "message": str(error),
            "param": error.param,
            "event_id": error.event_id,
        },
    )


def item_event(type: str, item: Item, previous: str | None) -> Event:
    """`conversation.item.added` or `conversation.item.done`."""
    return event(type, previous_item_id=previous, item=item.json())


def usage_json(usage: Usage) -> dict[str, Any]:
    """A response's `usage`."""
    given = usage.input_text + usage.input_audio
    made = usage.output_text + usage.output_audio
    return {
        "total_tokens": given + made,
        "input_tokens": given,
        "output_tokens": made,
        "input_token_details": {
            "text_tokens": usage.input_text,
            "audio_tokens": usage.input_audio,
            "image_tokens": 0,
            "cached_tokens": usage.cached_text + usage.cached_audio,
            "cached_tokens_details": {
                "text_tokens": usage.cached_text,
                "audio_tokens": usage.cached_audio,
                "image_tokens": 0,
            },
        },
        "output_token_details": {
            "text_tokens": usage.output_text,
            "audio_tokens": usage.output_audio,
        },
    }
