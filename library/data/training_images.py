"""An image that is trained on, as a visit needs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.captions.final_captions import CaptionPair
from library.config.digests import file_digest
from library.config.errors import UserError
from library.data.fingerprints import fingerprint_of, kind_of_latents
from library.data.latent_cache import CachedLatents, read_cache
from library.data.latent_shards import SHARD_SUFFIX, error_of_row
from library.data.stored_arrays import read_at
from library.data.subsets import Subset
from library.images.buckets import ALPHA, BucketedImage, MaskSource
from library.images.crops import Crop
from library.images.masks import mask_digest
from library.sdxl.sizes import LATENT_CHANNELS, PIXELS_PER_LATENT, Size

_PLACE_OF_MASK = 2  # after latents and flipped latents


class Kind(NamedTuple):
    """What the images of one batch share: data set, bucket, and whether their latents are cached."""

    dataset: int
    bucket: Size
    has_latents: bool


@dataclass(frozen=True, slots=True)
class TrainingImage:
    """One image of the training set; `size` is its own, `bucket` the size it is trained at.

    `latents` are in memory or in the cache file that is named, `content_digest` and `mask_digest` (None for an alpha
    channel) tell what they and their mask were made from; `place` says where in the file they were when it was read or
    written last. Without latents, `source` is encoded in each step.
    """

    key: str
    captions: CaptionPair
    subset: Subset
    size: Size
    bucket: Size
    crop: Crop
    latents: Path | CachedLatents | None = None
    content_digest: str | None = None
    source: BucketedImage | None = None
    loss_weight: float = 1.0
    mask: MaskSource | None = None
    mask_digest: str | None = None
    place: np.ndarray | None = None

    @property
    def has_latents(self) -> bool:
        """Whether the latents are cached, in memory or on disk."""
        return self.latents is not None

    @property
    def kind(self) -> Kind:
        """What the images of one batch share."""
        return Kind(self.subset.dataset, self.bucket, self.has_latents)

    def sample(self, *, flipped: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the latents (4, h, w) of the image or of the flipped one, and the mask (h, w) if it has one.

        A mask is never flipped. Where the file is as it was when it was read last, only these numbers of it are read.
        Raise as `read_latents`.
        """
        if isinstance(self.latents, Path) and self.place is not None:
            height, width = self.bucket.height // PIXELS_PER_LATENT, self.bucket.width // PIXELS_PER_LATENT
            wanted: dict[int, tuple[int, ...]] = {int(flipped): (LATENT_CHANNELS, height, width)}
            if self.mask is not None:
                wanted[_PLACE_OF_MASK] = height, width
            found = read_at(self.latents, self.place, wanted)
            if found is not None:
                return found[0], found[1] if len(found) > 1 else None
        cached = self.read_latents()
        return cached.in_direction(flipped=flipped), None if self.mask is None else cached.alpha_mask

    def read_latents(self) -> CachedLatents:
        """Return the cached latents. Raise `UserError` if their file is no longer usable, or is another by now."""
        assert self.latents is not None
        if not isinstance(self.latents, Path):
            return self.latents
        if self.latents.suffix == SHARD_SUFFIX:
            raise error_of_row(self.latents)
        cached = read_cache(self.latents)
        if cached.bucket != self.bucket or self.content_digest not in (None, cached.content_digest):
            other = "of another image" if cached.bucket == self.bucket else f"for {cached.bucket}, not {self.bucket}"
            raise UserError(
                f"'{self.latents}' was replaced while training: it holds latents {other}.",
                "Start again, or restore the latents and continue from a saved state.",
            )
        if self.mask is not None and (cached.alpha_mask is None or cached.mask_digest != self.mask_digest):
            raise UserError(
                f"'{self.latents}' was replaced while training: it holds no mask, or another one.",
                "Start again, or restore the latents and continue from a saved state.",
            )
        return cached

    def fingerprint(self) -> str:
        """Return a digest of captions, bucket, the image and its mask, whether latents are cached and what it is for.

        The files of image and mask are read unless the latents are cached. Raise `UserError` if one cannot be read.
        """
        if self.source is not None and not self.has_latents:
            content, kind, mask = file_digest(self.source.path), "pixels", mask_digest(self.mask)
        else:
            assert self.content_digest is not None
            content, kind, mask = self.content_digest, kind_of_latents(self.place), self.mask_digest
        return fingerprint_of(
            *self.captions,
            bucket=str(self.bucket),
            kind=kind,
            content=content,
            is_reg=self.subset.is_reg,
            mask=None if self.mask is None else mask or ALPHA,
        )


class KeptLatents(NamedTuple):
    """Latents that were encoded now: in memory or their file, and where in it; the digests of image and mask."""

    latents: Path | CachedLatents
    content_digest: str
    mask_digest: str | None = None
    place: np.ndarray | None = None
