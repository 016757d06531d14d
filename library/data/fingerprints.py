"""Fingerprints of what an image shows and how it is captioned, by which a resumed run notices changes."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from library.config.digests import digest
from library.data.stored_arrays import BF16
from library.images.buckets import ALPHA
from library.sdxl.sizes import Size

if TYPE_CHECKING:
    from library.data.training_columns import TrainingSet

_FINGERPRINT_BYTES = 8


def fingerprint_of(
    variants_l: Sequence[str],
    variants_g: Sequence[str],
    *,
    bucket: str,
    kind: str,
    content: str,
    is_reg: bool,
    mask: str | None,
) -> str:
    """Return a digest of captions, bucket, kind and digest of the content, what the image is for, and its mask."""
    masked = [] if mask is None else ["mask", mask]
    parts = ("\n".join(variants_l), "\n".join(variants_g), bucket, kind, content, *["regularization"] * is_reg, *masked)
    encoded = [part.encode("utf-8", errors="surrogatepass") for part in parts]
    with_lengths = b"".join([half for part in encoded for half in (len(part).to_bytes(8, "little"), part)])
    return digest([with_lengths], _FINGERPRINT_BYTES).hex()


def kind_of_latents(place: np.ndarray | None) -> str:
    """Return the kind of latents at a place, or in memory: those in bf16 are other numbers."""
    return _KINDS[place is not None and int(place["kinds"][0]) == BF16]


_KINDS = ("latents", "latents in bf16")


class Fingerprints(Mapping[str, str]):
    """The fingerprint of each image by its key, to notice on resuming that images or captions have changed.

    They are computed when they are first asked for; at once where image files are read for that.
    """

    def __init__(self, images: "TrainingSet"):
        self._images = images
        if not self._images.all_have_latents:
            self._all  # noqa: B018

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __getitem__(self, key: str) -> str:
        return self._all[key]

    @cached_property
    def _all(self) -> dict[str, str]:
        images = self._images
        if not images.all_have_latents:
            return {image.key: image.fingerprint() for image in images}
        names = {tuple(pair): str(Size(*pair)) for pair in np.unique(images.columns["buckets"], axis=0).tolist()}
        columns = (
            images.texts["keys"],
            images.variants["l"],
            images.variants["g"],
            images.columns["buckets"].tolist(),
            (images.columns["places"]["kinds"][:, 0] == BF16).tolist(),
            images.columns["contents"].tolist(),
            images.of_subset(lambda subset: subset.is_reg).tolist(),
            images.texts["masks"],
            images.columns["mask_contents"].tolist(),
        )
        return {
            key: fingerprint_of(
                *captions,
                bucket=names[tuple(bucket)],
                kind=_KINDS[is_bf16],
                content=content.decode(),
                is_reg=is_reg,
                mask=(mask_content.decode() or ALPHA) if mask else None,
            )
            for key, *captions, bucket, is_bf16, content, is_reg, mask, mask_content in zip(*columns, strict=True)
        }
