"""Before the merge scripts: write tags beside the images, as a tagger of the WD14 kind sees them."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from library.annotation.tag_options import TAGGER_SPELLINGS, TaggerOptions, TagImageOptions, TagOptions, conflicts
from library.config.errors import exits_on_user_error
from library.config.options import parse_options
from library.training.run_lock import run_lock

DESCRIPTION = "Write tags beside images (.txt, the captions of encoder L) with a tagger of the WD14 kind."
OPTION_CLASSES: list[type] = [TagImageOptions, TaggerOptions, TagOptions]
SPELLINGS = TAGGER_SPELLINGS


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Tag the images that the command line names; return 1 if some have no tags."""
    images, model, tags = parse_options(
        OPTION_CLASSES, argv, description=DESCRIPTION, spellings=SPELLINGS, conflicts=conflicts
    )
    # Only now: a mistake on the command line is answered before numpy and the image formats are imported.
    from library.annotation.caption_run import caption_folder
    from library.annotation.describing import CaptionWriter
    from library.annotation.tagger import Tagger

    def open_model() -> Tagger:
        from library.annotation.hub_models import tagger_files
        from library.annotation.tag_choice import read_labels, tag_choice
        from library.annotation.tagger import open_tagger

        file, labels = tagger_files(model.model_dir, model.repo_id, force_download=model.force_download)
        return open_tagger(file, tag_choice(read_labels(labels), tags), tags.caption_separator)

    appended_by = tags.caption_separator if tags.append_tags else None
    writer = CaptionWriter(images.train_data_dir, images.caption_extension, images.keeps_existing, appended_by)
    with run_lock(images.train_data_dir, f"{images.caption_extension} files", doing="writing"):
        return caption_folder(images, writer, open_model, all_tags=tags.frequency_tags)


if __name__ == "__main__":
    sys.exit(main())
