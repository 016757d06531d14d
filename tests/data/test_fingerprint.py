"""Whatever makes an image another one changes its fingerprint, and nothing else does."""

import pytest

from library.data.fingerprint import fingerprints
from library.sdxl.sizes import Size


@pytest.fixture
def of(folder):
    """`of(**entry)` is the fingerprint of the one picture a.png, with latents unless told otherwise."""

    def read(cached: bool = True, **entry) -> str:
        if not (folder.images / "a.png").exists():
            folder.add()
        cache = folder.add_cache(folder.images / "a.png")
        if not cached:
            cache.unlink()
        images = folder.read({"a": folder.entry(resolution=folder.bucket, **entry)}, skip_cache_check=True)
        return fingerprints(images)["a"]

    return read


def test_the_same_image_has_the_same_fingerprint(of):
    assert of() == of()


@pytest.mark.parametrize("change", [{"caption_l": "other"}, {"caption_g": "other"}, {"cached": False}], ids=str)
def test_captions_and_kind_of_latents_count(of, change: dict):
    assert of(**change) != of()


def test_the_border_between_the_captions_counts(of):
    assert of(caption_l="ab", caption_g="c") != of(caption_l="a", caption_g="bc")


def test_the_picture_counts(of, folder):
    before = of()
    folder.add("a.png", Size(101, 60))
    assert of() != before
