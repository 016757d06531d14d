"""One image that may fail: draw it, or say why not."""

import logging
from collections.abc import Callable
from functools import partial

import torch
from PIL import Image

from library.samples.picture_files import PictureRecord
from library.samples.sampler import SamplingNetworks, draw_picture

log = logging.getLogger(__name__)


def try_to_draw(
    networks: SamplingNetworks, record: PictureRecord, where: str, min_chunks: int = 1
) -> Image.Image | None:
    """Return the image of a record, or None after a warning that begins with `where` and says why there is none."""
    draw = partial(
        draw_picture,
        networks,
        record.prompt,
        sampler=record.sampler,
        width=record.width,
        height=record.height,
        seed=record.seed,
        min_chunks=min_chunks,
    )
    return unless_it_fails(draw, record, where)


def unless_it_fails(draw: Callable[[], Image.Image | None], record: PictureRecord, where: str) -> Image.Image | None:
    """Return the image of a record that `draw` returns, or None after a warning as `try_to_draw`."""
    try:
        image = draw()
    except (torch.OutOfMemoryError, MemoryError):
        log.warning(
            "%s is not drawn: out of memory for %dx%d; lower its --w and --h", where, record.width, record.height
        )
        return None
    except RuntimeError as error:  # the CPU's memory, or a kernel's: torch has no class for these
        log.warning("%s is not drawn: %s", where, error)
        return None
    if image is None:
        log.warning("%s is NaN and is not saved (fp16? add --no_half_vae)", where)
    return image
