"""Show the samples of a run in one table: prompts as rows, steps as columns.

python finetune/contact_sheet.py "my set/output/sample"
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from library.config.atomic_files import replacing, write_text
from library.config.errors import UserError, exits_on_user_error
from library.config.options import option, parse_options, positional

if TYPE_CHECKING:  # a mistake on the command line is answered before it is imported
    from PIL import Image

log = logging.getLogger(__name__)

DESCRIPTION = "Show the samples of a run in one table, as a page and as an image: prompts as rows, steps as columns."
_NAME = "contact_sheet"
_PAGE, _IMAGE = ".html", ".png"


@dataclass(frozen=True)
class ContactSheetOptions:
    """The samples, and the files to write."""

    _argument_group_name: ClassVar[str] = "Contact sheet"

    samples: Path = positional("Folder of the samples: 'sample' in the output folder of a run.")
    output: Path | None = option(
        None,
        f"File to write, in {_PAGE} or {_IMAGE}; without such an ending both are written. Default: {_NAME}{_PAGE} and "
        f"{_NAME}{_IMAGE} beside the folder of the samples.",
    )
    num_columns: int | None = option(
        None, "Show at most this many steps, evenly chosen, the first and the last among them.", least=1, most=10_000
    )
    image_side: int = option(
        256,
        "Reduce larger images to this many pixels in the image file. The page shows them whole.",
        least=16,
        most=8192,
    )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if not self.samples.is_dir():
            yield f"there is no folder '{self.samples}'. Pass the folder 'sample' of an output folder."

    @property
    def files(self) -> list[Path]:
        """The files to write."""
        path = self.samples.parent / _NAME if self.output is None else self.output
        if path.suffix.lower() in (_PAGE, _IMAGE):
            return [path]
        return [path.with_name(path.name + suffix) for suffix in (_PAGE, _IMAGE)]


OPTION_CLASSES: list[type] = [ContactSheetOptions]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Write the contact sheet and return the exit status."""
    (options,) = parse_options(OPTION_CLASSES, argv, description=DESCRIPTION)
    from library.samples.contact_sheet import contact_page, contact_sheet, find_samples, last_steps

    samples = find_samples(options.samples)
    if options.num_columns is not None:
        samples = last_steps(samples, options.num_columns)
    for path in options.files:
        if path.suffix.lower() == _PAGE:
            write_text(path, contact_page(samples, path.parent))
        else:
            _write_image(path, contact_sheet(samples, options.image_side))
        log.info("contact sheet: '%s'", path)
    return 0


def _write_image(path: Path, sheet: "Image.Image") -> None:
    with replacing(path) as file:
        try:
            sheet.save(file, format="PNG")
        except (SystemError, MemoryError) as error:
            raise UserError(f"'{path}' cannot be written: {error}.", "Lower --num_columns or --image_side.") from error


if __name__ == "__main__":
    sys.exit(main())
