"""The command `python studio.py`: options, the port, the link, and the server until Ctrl-C."""

import logging
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.config.errors import UserError, exits_on_user_error
from library.config.options import parse_options
from library.data.subsets import Subset
from studio.options import OPTION_CLASSES, RunsOptions, ServerOptions, set_conflicts, subsets_of

if TYPE_CHECKING:
    from studio.runs import Runs

log = logging.getLogger(__name__)

DESCRIPTION = "Write both captions of each image in the browser; start, watch and look at runs there."
REQUIREMENTS = "requirements-studio.txt"


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the studio until it is stopped; return the exit status."""
    options, server, machines, captions, buckets, run_options = parse_options(
        OPTION_CLASSES,
        argv,
        description=DESCRIPTION,
        conflicts=lambda *classes: set_conflicts(classes[0], classes[-1]),
    )
    subsets = subsets_of(options, captions, buckets) if options.names_a_set else []
    try:
        from studio.opened import Opened
        from studio.serving import listening_socket, make_server

        opened = Opened(subsets, options.seed, machines) if subsets else None
        runs = runs_of(run_options, subsets)
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is not installed.", f"pip install -r {REQUIREMENTS}") from error
    listening = listening_socket(server)
    port = listening.getsockname()[1]
    token = server.token or secrets.token_urlsafe(24)
    serving = make_server(opened, server, port, token, runs)
    link = f"http://{_host_of_link(server)}:{port}/{'' if subsets else 'runs'}?token={token}"
    log.info("the studio is open: %s", link)
    log.info("Ctrl-C closes it.")
    if server.open_browser:
        import webbrowser

        webbrowser.open(link)
    serving.run(sockets=[listening])
    return 0


def runs_of(options: RunsOptions, subsets: Sequence[Subset]) -> "Runs | None":
    """Return the runs that are opened, None where no folder of runs is named."""
    if not options.run_dirs:
        return None
    from studio.runs import Runs

    files = [each.metadata_file.parent for each in subsets if each.metadata_file is not None]
    return Runs(options.run_dirs, [*(options.model_dirs or []), *(each.image_dir for each in subsets), *files])


def _host_of_link(server: ServerOptions) -> str:
    if server.listen is None:
        return "127.0.0.1"
    host = (server.allowed_hosts or [server.listen])[0]
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
