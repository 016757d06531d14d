"""Requests to functions and their results to JSON: what each route has in common."""

import json
import logging
from collections.abc import Awaitable, Callable
from json import JSONDecodeError
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from library.captions.draws import ENCODERS, Encoder
from library.config.atomic_files import CannotWrite
from library.config.errors import UserError
from library.config.file_names import json_bytes

log = logging.getLogger(__name__)

UNFORESEEN = "Please report it, with what the studio has written into its terminal."
Body = dict[str, Any]
Answer = Callable[[Request, Body], Any]


class Stale(Exception):
    """What a request is about has changed meanwhile; `now` says what it is by now."""

    def __init__(self, problem: str, now: Any = None):
        super().__init__(problem)
        self.now = now


class AnyText(JSONResponse):
    """JSON that holds any name of a file, and any caption, also those that are no UTF-8."""

    def render(self, content: Any) -> bytes:
        """Return the bytes of the answer."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return json_bytes(text)


def answering(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a function that runs in a thread: it is handed the JSON of a body, and returns JSON."""

    async def endpoint(request: Request) -> Response:
        try:
            body = await _json_of(request)
            result = await run_in_threadpool(answer, request, body)
            return result if isinstance(result, Response) else AnyText(result)
        except Stale as error:
            return AnyText({"problem": str(error), "now": error.now}, status_code=412)
        except CannotWrite as error:
            return AnyText({"problem": error.problem, "remedy": error.remedy}, status_code=507)
        except UserError as error:
            return AnyText({"problem": error.problem, "remedy": error.remedy}, status_code=400)
        except Exception as error:  # told where it was asked for, and in the terminal
            log.exception("%s failed in a way that nobody foresaw", request.url.path)
            problem = f"this failed in a way that nobody foresaw: {type(error).__name__}: {error}"
            return AnyText({"problem": problem, "remedy": UNFORESEEN}, status_code=500)

    return endpoint


async def _json_of(request: Request) -> Body:
    if request.method in ("GET", "HEAD"):
        return {}
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise UserError("expected JSON.", "Send it as application/json.")
    try:
        body = json.loads(await request.body())
    except (JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"this is no JSON: {error}.") from error
    if not isinstance(body, dict):
        raise UserError("expected an object.")
    return body


def text(body: Body, name: str, default: str | None = None) -> str:
    """Return a text of a body. Raise `UserError` unless it is one that can be written as UTF-8."""
    value = body.get(name, default)
    if not isinstance(value, str):
        raise UserError(f"expected '{name}' to be a text.")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"'{name}' holds a character that no file can hold.", "Remove it.")
    return value


def number(value: Any, name: str) -> int:
    """Return a whole number from 0. Raise `UserError` for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 16:
        value = int(value)
    if type(value) is not int or value < 0:
        raise UserError(f"expected '{name}' to be a number.")
    return int(value)


def encoder(value: Any) -> Encoder:
    """Return which encoder is meant. Raise `UserError` unless it is one of the two."""
    for each in ENCODERS:
        if value == each:
            return each
    raise UserError("expected an encoder: l or g.")
