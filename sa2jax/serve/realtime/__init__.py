"""The Realtime API of OpenAI over a WebSocket: speech in, speech out, interrupted by speaking.

What the protocol says is a state machine without sockets (`session`), whatever answers is a
`responder`, and `connection` joins both to a client. `routes.Realtime(...).router` is what an
application includes.
"""
