"""The server: OpenAI's protocols over HTTP and WebSocket, for many conversations at once.

    app = create_app(model, Settings(rows=8))  # a FastAPI application: uvicorn, or anything ASGI

`app` joins the rooms; `state` holds what all requests share; `bridge` lets a worker thread iterate
a stream of the library while the event loop hands its pieces on. Nothing here touches jax in the
event loop.
"""
