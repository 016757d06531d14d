"""The server of the studio: a port, the guard in front of the application, and an end that waits for nobody."""

import socket
from typing import TYPE_CHECKING

import uvicorn

from library.config.errors import UserError
from studio.app import make_app
from studio.opened import Opened
from studio.options import ServerOptions
from studio.safety import Guard

if TYPE_CHECKING:
    from studio.runs import Runs

_SECONDS_TO_FINISH = 5


class Server(uvicorn.Server):
    """A server whose pages are told to stop listening before it waits for its requests."""

    def __init__(self, config: uvicorn.Config, opened: Opened | None):
        super().__init__(config)
        self._opened = opened

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is being written, and end."""
        if self._opened is not None:
            self._opened.hub.close()
        await super().shutdown(sockets)


def make_server(
    opened: Opened | None, options: ServerOptions, port: int, token: str, runs: "Runs | None" = None
) -> Server:
    """Return the server of the set and the runs that are open, for the port that a socket listens at."""
    app = Guard(make_app(opened, runs), [f"{host}:{port}" for host in options.hosts], token, cookie=f"studio-{port}")
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )
    return Server(config, opened)


def listening_socket(options: ServerOptions) -> socket.socket:
    """Return a socket at the address and port that are asked for. Raise `UserError` where that is impossible."""
    address = options.listen or "127.0.0.1"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listening = socket.create_server((address, options.port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen at {address}, port {options.port}: {error.strerror or error}.",
            "Close the other studio, or choose another --port (0: any that is free).",
        ) from error
    # Connections inherit it. asyncio sets it only where a socket names its protocol, and this one names none: the body
    # of each answer would wait 40 ms for the browser to acknowledge its headers.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
