"""Collect the caption files of encoder G beside the images of a folder into a metadata file."""

import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a script, Python looks for modules beside this file only; `library` lies one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.config.errors import exits_on_user_error
from library.config.options import parse_options
from library.data.caption_files import MergeOptionsG, merge_captions
from library.data.metadata import COLUMN_G

DESCRIPTION = "Collect the captions of encoder G, one file beside each image, into a metadata file."
OPTION_CLASSES = [MergeOptionsG]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv` and return its exit status."""
    (options,) = parse_options(OPTION_CLASSES, argv, description=DESCRIPTION)
    merge_captions(options, COLUMN_G)
    return 0


if __name__ == "__main__":
    sys.exit(main())
