"""Files of latents as they are written or found to fit, with their entries in the indexes beside the metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.data.columns import Texts
from library.data.latent_cache import CachedLatents, write_cache
from library.data.latent_entries import Entries, states_of
from library.data.training_images import KeptLatents
from library.images.buckets import BucketedImage


class Place(NamedTuple):
    """The file of the latents of an image, the index that has its entry, and the folder in which that names files."""

    file: Path
    index_folder: Path
    folder: Path | None


class IndexedFiles:
    """The files of latents of some images, and their entries. Images must not have been read before this is made."""

    def __init__(self, places: Mapping[BucketedImage, Place]):
        self._file_of = {image: place.file for image, place in places.items()}
        members: dict[tuple[Path, Path | None], list[BucketedImage]] = {}
        for image, place in places.items():
            members.setdefault((place.index_folder, place.folder), []).append(image)
        self._entries: dict[BucketedImage, tuple[Entries, int]] = {}
        for (path, folder), images in members.items():
            caches = Texts.of(str(self._file_of[image]) for image in images)
            files = Texts.of(str(image.path) for image in images)
            entries = Entries(path, folder, caches, files, Texts.of(str(image.mask or "") for image in images))
            self._entries.update({image: (entries, row) for row, image in enumerate(images)})
        self._states = {image: states_of(image.path, image.mask) for image in places}  # before they are read

    def write(self, image: BucketedImage, cached: CachedLatents) -> KeptLatents:
        """Write the latents of an image to its file."""
        file = self._file_of[image]
        place = write_cache(file, cached)
        entries, row = self._entries[image]
        entries.note(row, cached, place, self._states[image], is_own=True)
        return KeptLatents(file, cached.content_digest, cached.mask_digest, place)

    def keep(self, image: BucketedImage, cached: CachedLatents, place: np.ndarray | None) -> None:
        """Note a file that fits its image."""
        entries, row = self._entries[image]
        entries.note(row, cached, place, self._states[image])

    def save_index(self) -> None:
        """Write what is new into the indexes."""
        for entries in {id(entries): entries for entries, _ in self._entries.values()}.values():
            entries.save()
