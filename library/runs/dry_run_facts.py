"""What a dry run knows of an image and of the whole set."""

from dataclasses import dataclass

from library.captions.rules import CaptionDropout
from library.data.caption_summary import CaptionSummary


@dataclass(frozen=True)
class ReadCaption:
    """A final text of one encoder: what is read, what is cut off, and whether its outputs are cached.

    `cache` is "each step", "cached at the start", "cached" or "missing".
    """

    text: str
    cut: str
    is_dropped: bool
    num_tokens: int
    limit: int
    cache: str


@dataclass(frozen=True)
class Visit:
    """One visit of an image; `epoch` counts from 1."""

    epoch: int
    is_flipped: bool
    caption_l: ReadCaption
    caption_g: ReadCaption


@dataclass(frozen=True)
class ImageFacts:
    """An image: sizes are (width, height); the crop is (left, top) in the resized image, which cached latents hide."""

    key: str
    file: str | None
    size: tuple[int, ...]
    bucket: tuple[int, ...]
    resized: tuple[int, ...] | None
    crop: tuple[float, float]
    latents: str
    visits: list[Visit]


@dataclass(frozen=True)
class SetFacts:
    """The totals of a run; bytes are those it would write, None where that is not known."""

    num_images: int
    num_batches: int
    steps_per_epoch: int
    num_steps: int
    num_epochs: int
    seed: int
    is_seed_given: bool
    num_without_latents: int
    latents_to_write: int
    bytes_of_model: int | None
    captions: CaptionSummary
    dropout: CaptionDropout
