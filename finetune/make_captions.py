"""Before the merge scripts: write a sentence beside each image, with a model that reads images."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from library.annotation.sentence_options import (
    CAPTIONER_SPELLINGS,
    CaptionerOptions,
    SentenceImageOptions,
    WordOptions,
    conflicts,
)
from library.config.errors import exits_on_user_error, listed
from library.config.options import parse_options
from library.training.run_lock import run_lock

DESCRIPTION = "Write a sentence beside each image (.caption, the captions of encoder G) with a model of transformers."
OPTION_CLASSES: list[type] = [SentenceImageOptions, CaptionerOptions, WordOptions]
SPELLINGS = CAPTIONER_SPELLINGS

log = logging.getLogger(__name__)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Caption the images that the command line names; return 1 if some have no caption."""
    images, model, words = parse_options(
        OPTION_CLASSES, argv, description=DESCRIPTION, spellings=SPELLINGS, conflicts=conflicts
    )
    # Only now: a mistake on the command line is answered before numpy and the image formats are imported.
    from library.annotation.caption_run import caption_folder
    from library.annotation.describing import CaptionWriter
    from library.annotation.reading_ahead import Machine

    opened = []

    def open_model() -> Machine:
        from library.annotation.captioner import Captioner
        from library.annotation.captioner_model import open_captioner

        network = open_captioner(model.model_name_or_path, model.mixed_precision)
        opened.append(Captioner(network, model, words, images.train_data_dir, images.max_image_side))
        return opened[0]

    writer = CaptionWriter(images.train_data_dir, images.caption_extension, images.keeps_existing)
    with run_lock(images.train_data_dir, f"{images.caption_extension} files", doing="writing"):
        status = caption_folder(images, writer, open_model)
    without_text = sorted({name for each in opened for name in each.without_text})
    if without_text:
        log.warning(
            "%d images were captioned without a text of %s, which they do not have: %s",
            len(without_text),
            model.also_read.upper(),
            listed(without_text),
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
