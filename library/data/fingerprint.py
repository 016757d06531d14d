"""A fingerprint of each training image, to notice on resuming that pictures or captions have changed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from library.data.latent_cache import file_digest, read_cache
from library.data.training_set import TrainingImage


def fingerprints(images: Iterable[TrainingImage]) -> dict[str, str]:
    """Key to fingerprint: of both captions, the bucket, and the picture (or its latents, where those are all).

    Whether latents are at hand counts too: a batch has them for all of its pictures or for none.
    """
    return {image.key: _fingerprint(image) for image in images}


def _fingerprint(image: TrainingImage) -> str:
    kind = "pixels" if image.latents is None else "latents"
    parts = (image.caption_l, image.caption_g, str(image.bucket), kind, _picture_digest(image))
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode("utf-8", errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _picture_digest(image: TrainingImage) -> str:
    if image.latents is None:
        assert image.source is not None
        return file_digest(image.source.path)
    cached = read_cache(image.latents) if isinstance(image.latents, Path) else image.latents
    return cached.image_digest or hashlib.blake2b(cached.latents.tobytes(), digest_size=16).hexdigest()
