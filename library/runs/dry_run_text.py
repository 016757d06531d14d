"""A dry run as text for a terminal."""

from collections.abc import Iterator

from library.captions.rules import CaptionDropout
from library.data.caption_summary import BIN, EncoderSummary
from library.runs.dry_run_facts import ImageFacts, ReadCaption, SetFacts

_BAR = 30  # characters of the longest one


def image_lines(image: ImageFacts) -> Iterator[str]:
    """Yield the lines of one image."""
    resized = "" if image.resized is None else f", resized to {_size(image.resized)}"
    crop = f"crop at {image.crop[0]:g},{image.crop[1]:g}"
    yield f"{image.key}: {_size(image.size)} -> {_size(image.bucket)}{resized}, {crop}; latents {image.latents}"
    for visit in image.visits:
        yield f"  epoch {visit.epoch}{', flipped' if visit.is_flipped else ''}"
        yield f"    L {_caption(visit.caption_l)}"
        yield f"    G {_caption(visit.caption_g)}"


def set_lines(facts: SetFacts) -> Iterator[str]:
    """Yield the lines of the totals."""
    yield (
        f"{facts.num_images} images in {facts.num_batches} batches, {facts.steps_per_epoch} steps per epoch, "
        f"{facts.num_steps} steps in {facts.num_epochs} epochs, seed {facts.seed}"
        + ("" if facts.is_seed_given else " (no --seed: the run will draw another)")
    )
    summary = facts.captions
    for name, encoder in (("L", summary.encoder_l), ("G", summary.encoder_g)):
        yield f"{name}: {encoder_sentence(encoder)}"
        yield from _histogram(encoder)
    yield f"{summary.num_pairs} different pairs of captions, {summary.num_encodings} encodings before training"
    if summary.shared_words:
        words = ", ".join(f"{word} ({count})" for word, count in summary.shared_words)
        yield f"words in both captions of an image, which blur the division: {words}"
    yield from dropout_lines(facts.dropout)
    yield disk_line(facts)


def dropout_lines(dropout: CaptionDropout) -> Iterator[str]:
    """Yield the 2x2 table of whole captions that are dropped at random."""
    yield "captions dropped    G kept   G dropped"
    for name, rates in zip(("L kept   ", "L dropped"), dropout.table, strict=True):
        yield f"  {name}      {100 * rates[0]:>7.2f} %   {100 * rates[1]:>7.2f} %"


def disk_line(facts: SetFacts) -> str:
    """Return what the run would write."""
    model = "unknown" if facts.bytes_of_model is None else f"{facts.bytes_of_model / 2**30:.2f} GiB"
    return (
        f"{facts.num_without_latents} images without fitting latents; disk: {facts.latents_to_write / 2**20:.1f} MiB "
        f"of latents, each saved model about {model} (the size of its source)"
    )


def encoder_sentence(encoder: EncoderSummary) -> str:
    """Return the numbers of the captions of one encoder."""
    texts = "drawn at each visit" if encoder.num_texts is None else f"{encoder.num_texts} texts"
    cached = "cached" if encoder.is_cached else "encoded in each step"
    return f"{encoder.num_captions} different captions, {texts}, {cached}, {encoder.num_empty} empty"


def _histogram(encoder: EncoderSummary) -> Iterator[str]:
    most = max(encoder.histogram, default=0)
    for index, count in enumerate(encoder.histogram):
        if count:
            bar = "#" * max(1, count * _BAR // most)
            yield f"  {index * BIN:>4}-{(index + 1) * BIN - 1:<4} tokens {count:>8}  {bar}"


def _caption(caption: ReadCaption) -> str:
    tokens = f"{min(caption.num_tokens, caption.limit)}/{caption.limit} tokens, {caption.cache}"
    if caption.is_dropped:
        return f"(dropped) {tokens}"
    cut = f" [cut: {caption.cut.strip()}]" if caption.cut else ""
    return f"'{caption.text}'{cut} {tokens}"


def _size(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
