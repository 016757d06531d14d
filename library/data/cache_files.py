"""Which file holds the latents of an image: ours or the 2023 trainer's, or that of the 2026 trainer."""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from library.config.errors import UserError
from library.data.latent_cache import cache_path
from library.images.keys import is_file
from library.images.reading import read_size
from library.sdxl.sizes import Size

_NAME_OF_SD_SCRIPTS = re.compile(r"(?P<stem>.+)_(?P<width>\d{4,6})x(?P<height>\d{4,6})_sdxl\.npz", re.DOTALL)


def cache_finder() -> Callable[[Path], Path]:
    """Return a function that finds the cache file of an image; it lists each folder once.

    That is `{stem}.npz` beside the image, or else `{stem}_WxH_sdxl.npz` of the 2026 trainer for its present size. If
    there is neither, it is the path where we would write it.
    """
    in_folder = cache(caches_of_sd_scripts)

    def find(image: Path) -> Path:
        path = cache_path(image)
        if is_file(path) or not (others := in_folder(image.parent).get(image.stem)):
            return path
        if not is_file(image):  # only the latents are here
            return next(iter(others.values())) if len(others) == 1 else path
        with suppress(UserError):  # reported where the image is read
            return others.get(read_size(image), path)
        return path

    return find


def caches_of_sd_scripts(folder: Path) -> dict[str, dict[Size, Path]]:
    """Return the cache files that the trainer of 2026 wrote into `folder`, `{stem}_WxH_sdxl.npz`, by stem and size.

    The size is that of the image, and the content that of `{stem}.npz`.
    """
    found: dict[str, dict[Size, Path]] = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if match := _NAME_OF_SD_SCRIPTS.fullmatch(entry.name):
                size = Size(int(match["width"]), int(match["height"]))
                found.setdefault(match["stem"], {})[size] = folder / entry.name
    return found


def require_separate_caches(images: Iterable[Path]) -> None:
    """Raise `UserError` naming both if two images share one cache file, as a.jpg and a.png do."""
    image_of: dict[Path, Path] = {}
    for image in images:
        first = image_of.setdefault(cache_path(image), image)
        if first != image:
            raise UserError(
                f"'{first}' and '{image}' would share the latents file '{cache_path(image).name}'.",
                "Remove one of them, or rename it together with its caption files.",
            )
