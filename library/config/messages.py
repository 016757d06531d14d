"""What a script tells its user while it works."""

import sys

from tqdm import tqdm


def notify(notice: str) -> None:
    """Print a line to standard error, above the progress bar if one is shown."""
    tqdm.write(notice, file=sys.stderr)
