"""Who may ask for what: a guard in front of every route, and what the browser is told to refuse."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 16 << 20

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Nothing from elsewhere, no script or style within the page, and no text that becomes markup."""

_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_READING = ("GET", "HEAD")
_PAGES = ("/", "/runs")


@dataclass(frozen=True)
class Guard:
    """An ASGI application in front of another that lets only requests of the page through.

    `hosts` are names with their port. The token comes once, with the link, and stays as a cookie; programs may send it
    as `Authorization: Bearer`.
    """

    app: ASGIApp
    hosts: Sequence[str]
    token: str
    cookie: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        with_headers = _adding_headers(send)
        if refusal is not None:
            await refusal(scope, receive, with_headers)
            return
        await self.app(scope, _limited(receive), with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if host not in self.hosts:
            return _refused(421, "The studio does not answer to this name.")
        bears_token = secrets.compare_digest(headers.get("authorization", "").encode(), f"Bearer {self.token}".encode())
        is_reading = scope["method"] in _READING
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return _refused(403, "This request comes from another page.")
        if not is_reading and origin is None and not bears_token:
            return _refused(403, "This request does not say which page it comes from.")
        is_visit = is_reading and headers.get("sec-fetch-mode") == "navigate" and scope["path"] in _PAGES
        if site not in (None, "same-origin") and not (is_visit and site == "none"):
            return _refused(403, "This request comes from another page.")
        if is_visit or scope["path"] in _PAGES:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if secrets.compare_digest(given.encode(), self.token.encode()):
                return self._welcome(scope["path"])
        if not bears_token and not secrets.compare_digest(_cookie(headers, self.cookie).encode(), self.token.encode()):
            return _refused(403, "Open the studio with the link that it printed at its start.")
        if (
            int(headers.get("content-length", "0") if headers.get("content-length", "0").isdecimal() else "0")
            > LARGEST_BODY
        ):
            return _refused(413, "That is too large.")
        return None

    def _welcome(self, page: str) -> Response:
        response = RedirectResponse(page, status_code=303)
        response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
        return response


def _refused(status: int, why: str) -> Response:
    return PlainTextResponse(why + "\n", status_code=status)


def _cookie(headers: Headers, name: str) -> str:
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[name].value if name in cookies else ""


def _adding_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return sending


def _limited(receive: Receive) -> Receive:
    """Return `receive` that ends a body which goes on for longer than it may."""
    num_bytes = 0

    async def receiving() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        return {"type": "http.disconnect"} if num_bytes > LARGEST_BODY else message

    return receiving
