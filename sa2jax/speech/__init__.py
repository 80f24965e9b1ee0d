"""Codes in, sound out: the detokenizer, its streams and its voices."""

from sa2jax.speech.api import Speech

__all__ = ["Speech"]
