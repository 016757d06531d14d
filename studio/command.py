"""The command `python studio.py`: options, the port, the link, and the server until Ctrl-C."""

import logging
import secrets
from collections.abc import Sequence

from library.config.errors import UserError, exits_on_user_error
from library.config.options import parse_options
from studio.options import OPTION_CLASSES, ServerOptions, subsets_of

log = logging.getLogger(__name__)

DESCRIPTION = "Look at the images of a set in the browser, and write both captions of each."
REQUIREMENTS = "requirements-studio.txt"


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the studio until it is stopped; return the exit status."""
    options, server, machines, captions, buckets = parse_options(OPTION_CLASSES, argv, description=DESCRIPTION)
    subsets = subsets_of(options, captions, buckets)
    try:
        from studio.opened import Opened
        from studio.serving import listening_socket, make_server
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is not installed.", f"pip install -r {REQUIREMENTS}") from error
    listening = listening_socket(server)
    port = listening.getsockname()[1]
    token = server.token or secrets.token_urlsafe(24)
    serving = make_server(Opened(subsets, options.seed, machines), server, port, token)
    link = f"http://{_host_of_link(server)}:{port}/?token={token}"
    log.info("the studio is open: %s", link)
    log.info("Ctrl-C closes it.")
    if server.open_browser:
        import webbrowser

        webbrowser.open(link)
    serving.run(sockets=[listening])
    return 0


def _host_of_link(server: ServerOptions) -> str:
    if server.listen is None:
        return "127.0.0.1"
    host = (server.allowed_hosts or [server.listen])[0]
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
