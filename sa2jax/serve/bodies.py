"""Bodies of requests: JSON and forms, within limits, as the dataclasses that routes want."""

from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from sa2jax.errors import FileError
from sa2jax.files.json_files import parse_json
from sa2jax.files.limits import Limits
from sa2jax.serve.errors import ApiError

M = TypeVar("M", bound=BaseModel)

MAX_FIELDS, MAX_FIELD_BYTES = 64, 1 << 20  # of a form
_ALTERNATIVES = ("str", "VoiceId")  # of a field that may be either: no part of its name
_VALUES, _DEPTH = 1_000_000, 64  # of a JSON body


async def read_json_body(request: Request) -> dict[str, Any]:
    """The JSON object that a request brings.

    Raises:
        ApiError: 400 for anything else, 413 if it is too large, 415 for another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(f"expected a body of type application/json, got {kind:.80}", 415)
    body = await request.body()
    limits = Limits(bytes=len(body), nodes=_VALUES, depth=_DEPTH)
    try:
        return parse_json(body, dict, where="the body", limits=limits)
    except FileError as error:
        raise ApiError(str(error), code="invalid_json") from None


def validated(model: type[M], value: Mapping[str, Any]) -> M:
    """A request of the given form.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False)) from None
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None


def invalid(problems: Sequence[Any]) -> ApiError:
    """The first of the problems that pydantic has found."""
    first = problems[0]
    loc = [str(part) for part in first["loc"] if part not in _ALTERNATIVES]
    param = ".".join(loc) or None
    got = first.get("input")
    shown = f", got {got!r:.60}" if isinstance(got, str | int | float | bool | None) else ""
    return ApiError(f"{param or 'the body'}: {first['msg']}{shown}", param=param)


@asynccontextmanager
async def read_form(request: Request):
    """The fields and files of a multipart form; the files are on disk and go at the end.

    Raises:
        ApiError: 400 for no form, or a damaged one; 413 if it is too large.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError("expected a body of type multipart/form-data", 415)
    try:
        form = await request.form(max_files=8, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except MultiPartException as error:
        raise ApiError(f"the form cannot be read: {error.message}") from None
    except (KeyError, ValueError, UnicodeError, AssertionError) as error:
        # What Starlette's parser lets through: a form without a boundary, an odd header.
        raise ApiError(f"the form cannot be read ({type(error).__name__})") from None
    try:
        yield form
    finally:
        await form.close()


def form_values(form: FormData, *, lists: Sequence[str] = ()) -> dict[str, Any]:
    """The texts of a form.

    Args:
        form: the form.
        lists: names of fields that may come several times, with or without `[]`.

    Raises:
        ApiError: for a file in place of a text.
    """
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        key = name.removesuffix("[]")
        if isinstance(value, UploadFile):
            continue
        if key in lists:
            values.setdefault(key, []).append(value)
        else:
            values[key] = value
    return values


def form_file(form: FormData, name: str) -> UploadFile:
    """A file of a form.

    Raises:
        ApiError: if there is none.
    """
    value = form.get(name)
    if not isinstance(value, UploadFile):
        got = "nothing" if value is None else "text"
        raise ApiError(f"{name}: expected a file, got {got}", param=name)
    return value
