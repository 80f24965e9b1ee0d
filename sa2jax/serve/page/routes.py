"""Routes of the web page: its files, which lie beside this one and are the same for all."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from sa2jax.serve.errors import ApiError

_HERE = Path(__file__).parent
_FILES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "player.js": "text/javascript",
    "session.js": "text/javascript",
    "microphone.js": "text/javascript",
}
# Its own scripts and connections only; a recording of a voice and sound that is played are blobs.
_POLICY = "default-src 'self'; media-src 'self' blob:; base-uri 'none'; frame-ancestors 'none'"

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page."""
    return _file("index.html")


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> FileResponse:
    """A file of the page."""
    if name not in _FILES:
        raise ApiError(f"no such file: {name:.80}", 404)
    return _file(name)


def _file(name: str) -> FileResponse:
    headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
    return FileResponse(_HERE / name, media_type=_FILES[name], headers=headers)
