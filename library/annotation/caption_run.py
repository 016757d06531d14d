"""A run of a captioner from the listing of a folder to the report, in one process or in several."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from library.annotation.describing import CaptionWriter, write_captions
from library.annotation.pending_images import Pending, pending_images
from library.annotation.tally import Tally, merged, report
from library.config.leftovers import remove_leftovers
from library.config.processes import Share, share_of_process

if TYPE_CHECKING:
    from library.annotation.image_options import ImageOptions
    from library.annotation.reading_ahead import Machine

log = logging.getLogger(__name__)

EXIT_SOME_WITHOUT = 1


def caption_folder(
    options: "ImageOptions", writer: CaptionWriter, open_model: "Callable[[], Machine]", *, all_tags: bool = False
) -> int:
    """Caption the images of a folder; return 1 if some have no caption for a reason that was named.

    The model is opened only if there is something to caption. Raise `UserError` where nothing can be done.
    """
    share = share_of_process()
    pending = pending_images(
        options.train_data_dir,
        writer.extension,
        recursive=options.recursive,
        keep_existing=writer.keeps_existing and writer.appended_by is None,
        batch_size=options.batch_size,
        share=share,
    )
    if pending.num_existing == pending.num_images and share.count == 1:
        log.info(
            "all %d images of '%s' have a %s file; --overwrite writes them again",
            pending.num_images,
            options.train_data_dir,
            writer.extension,
        )
        return 0
    if share.is_first:
        remove_leftovers(*pending.folders)
    tally = _captioned(pending, options, writer, open_model, share) if pending.images else Tally()
    tally.num_existing = pending.num_existing
    if share.count > 1:  # all meet here, those too that found nothing to do because another was faster
        tally = merged(share.gathered(tally))
    report(tally, options.train_data_dir, writer.extension, all_tags=all_tags)
    return EXIT_SOME_WITHOUT if tally.num_without else 0


def _captioned(
    pending: Pending, options: "ImageOptions", writer: CaptionWriter, open_model: "Callable[[], Machine]", share: Share
) -> Tally:
    machine = open_model()
    batch_size = machine.batch_size or options.batch_size
    if batch_size != options.batch_size:
        log.warning("the model was made for batches of %d; --batch_size=%d is not used", batch_size, options.batch_size)
    return write_captions(pending, machine, writer, options, batch_size, share)
