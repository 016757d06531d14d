"""The metadata file, JSON or JSONL: the key of each image with its captions and its training size."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.captions.final_captions import CaptionPair, variants_of
from library.config.atomic_files import replacing
from library.config.errors import UserError, error_of_errors, listed
from library.config.magnitudes import HEAVIEST
from library.data.metadata_lines import is_lines, read_lines, write_lines
from library.data.strict_json import pieces_of_json, shown, stream_json
from library.sdxl.sizes import MAX_ASPECT, MAX_SIDE, MIN_SIDE, PIXELS_PER_LATENT, Size

Entry = dict[str, Any]
Metadata = dict[str, Entry]

TRAIN_RESOLUTION = "train_resolution"
IMAGE_SIZE = "image_size"
LOSS_WEIGHT = "loss_weight"
IS_REG = "is_reg"
CAPTION, TAGS = "caption", "tags"
"""The captions that the scripts of sd-scripts write: a sentence and booru tags."""
_LARGEST_IMAGE = 1_000_000  # pixels of a side


@dataclass(frozen=True)
class CaptionColumn:
    """Where the captions of one text encoder are.

    In metadata under `metadata_key`, or else under `fallback_key`; beside an image in the file with the suffix
    `caption_extension`.
    """

    letter: str
    metadata_key: str
    fallback_key: str
    caption_extension: str

    @property
    def source_key(self) -> str:
        """The metadata key that records which file the caption was read from."""
        return f"{self.metadata_key}_source"


COLUMN_L = CaptionColumn("L", "captionL", TAGS, ".txt")
COLUMN_G = CaptionColumn("G", "captionG", CAPTION, ".caption")


def read_metadata(path: Path) -> Metadata:
    """Return the checked entries of a metadata file, including their unknown keys.

    A file with the suffix .jsonl has one object a line, whose image path is the key. Raise `UserError` naming file,
    image key (or line) and what was expected: for a file that cannot be read or is not UTF-8 (a byte-order mark is
    fine), broken JSON, a key that occurs twice in one object, and values of the wrong kind.
    """
    metadata: Metadata = {}
    for number, key, entry in entries_in(path):
        if key in metadata:
            where, what = f"'{path}'", f"the key '{key}' occurs twice in one object"
            if number is not None:
                where, what = f"'{path}', line {number}", f"an earlier line has the same image path '{key}'"
            raise UserError(f"{where}: {what}.", "Remove or rename one of the two.")
        metadata[key] = entry
    return metadata


def entries_in(path: Path) -> Iterator[tuple[int | None, str, Entry]]:
    """Yield line (in a file of lines), key and entry of each image, without holding the file in memory.

    A key that comes twice is yielded twice; else raise as `read_metadata`.
    """
    if is_lines(path):
        for number, key, entry in read_lines(path):
            check_entry(entry, f"'{path}', line {number}")
            yield number, key, entry
        return
    remedy = "or run the merge scripts again; a file with one object a line ends in .jsonl"
    missing = "Check the path, or make it with the merge scripts of finetune/."
    pairs = stream_json(path, remedy, if_missing=missing)
    for key, entry in pairs:
        try:
            check_entry(entry, path, key)
        except UserError:
            deque(pairs, maxlen=0)  # broken JSON further on explains it better
            raise
        yield None, key, entry


def write_metadata(path: Path, metadata: Mapping[str, Entry]) -> None:
    """Write `metadata` as JSON, whole or not at all: indent 2, or one object a line if the suffix is .jsonl.

    Non-ASCII characters are unescaped, except lone surrogates, which UTF-8 cannot encode. Raise `UserError` if `path`
    cannot be written.
    """
    if is_lines(path):
        write_lines(path, metadata)
        return
    with replacing(path) as file:
        file.writelines(pieces_of_json(metadata))


def text_of_metadata(metadata: Mapping[str, Entry]) -> str:
    """Return what `write_metadata` writes as JSON."""
    return b"".join(pieces_of_json(metadata)).decode()


def captions_of(entry: Entry, *, one_caption: bool = False, separators: tuple[str, str] = (",", ",")) -> CaptionPair:
    """Return the captions of an entry: those of L and G, or `caption` and `tags` where one of these is missing.

    With `one_caption` both encoders have `caption` followed by `tags`, joined as sd-scripts does: by the separator of
    tags alone (`separators` of L and G). Raise `KeyError` where an encoder has no caption; an empty one is a caption.
    """
    if one_caption:
        return CaptionPair(*(_joined(entry, separator) for separator in separators))
    variants_l, variants_g = variants_for(entry, COLUMN_L), variants_for(entry, COLUMN_G)
    if variants_l is None or variants_g is None:
        raise KeyError((COLUMN_L if variants_l is None else COLUMN_G).metadata_key)
    return CaptionPair(variants_l, variants_g)


def variants_for(entry: Entry, column: CaptionColumn) -> tuple[str, ...] | None:
    """Return the captions of an entry for one encoder, or None if there is none."""
    source = key_of_caption(entry, column)
    return None if source is None else _lines(_tags(entry) if source == TAGS else entry[source])


def key_of_caption(entry: Entry, column: CaptionColumn) -> str | None:
    """Return the key under which an entry has its caption for one encoder, None if it has none."""
    return _source(entry, column, one_caption=False)


def keys_without_caption(
    metadata: Mapping[str, Entry], column: CaptionColumn, *, one_caption: bool = False
) -> list[str]:
    """Return the keys of the entries from which `captions_of` reads no caption for `column`."""
    return [key for key, entry in metadata.items() if _source(entry, column, one_caption=one_caption) is None]


def require_captions(metadata: Mapping[str, Entry], path: Path, *, one_caption: bool = False) -> None:
    """Raise `UserError` naming the entries of the file `path` that lack a caption, encoder by encoder."""
    errors = [
        _error_without_caption(metadata, lacking, column, path, one_caption=one_caption)
        for column in (COLUMN_L, COLUMN_G)
        if (lacking := keys_without_caption(metadata, column, one_caption=one_caption))
    ]
    if errors:
        raise error_of_errors(f"encoders lack captions in '{path}'", errors[:1] if one_caption else errors)


def _error_without_caption(
    metadata: Mapping[str, Entry], lacking: Sequence[str], column: CaptionColumn, path: Path, *, one_caption: bool
) -> UserError:
    if one_caption:
        return UserError(
            f"'{path}': {len(lacking)} images have neither '{CAPTION}' nor '{TAGS}': {listed(lacking)}.",
            f"Add one of them, or train '{COLUMN_L.metadata_key}' and '{COLUMN_G.metadata_key}' without --one_caption.",
        )
    script = f"sdxl_merge_captions_{column.letter.lower()}_to_metadata.py"
    has_other = any(_is_caption(metadata[key].get(name)) for key in lacking for name in (CAPTION, TAGS))
    joint = f" --one_caption trains '{CAPTION}' and '{TAGS}' for both encoders." if has_other else ""
    return UserError(
        f"'{path}': {len(lacking)} images have no {column.letter} caption: {listed(lacking)}.",
        f"Write their caption files (which may be empty), run finetune/{script} and the preparation again, "
        "or remove these images from the metadata. --update_captions reads caption files that are there now."
        f"{joint}",
    )


Sources = tuple[str | None, str | None]
"""The keys from which the captions of L and G are read, None for one that is missing."""


def sources_of(entry: Entry, *, one_caption: bool = False) -> Sources:
    """Return from which keys the captions of an entry are."""
    return _source(entry, COLUMN_L, one_caption=one_caption), _source(entry, COLUMN_G, one_caption=one_caption)


def loss_weight(entry: Entry) -> float:
    """Return the factor of the loss of the image; 1 where the entry names none."""
    return float(entry.get(LOSS_WEIGHT, 1.0))


def is_reg(entry: Entry) -> bool:
    """Return whether the image is a regularization image."""
    return bool(entry.get(IS_REG, False))


def train_resolution(entry: Entry) -> Size | None:
    """Return the bucket that was chosen for the image, in whole latent cells; None before buckets were prepared.

    Files of 2023 hold sizes such as 818x1281, of which the VAE leaves 816x1280.
    """
    if TRAIN_RESOLUTION not in entry:
        return None
    width, height = entry[TRAIN_RESOLUTION]
    return Size(width - width % PIXELS_PER_LATENT, height - height % PIXELS_PER_LATENT)


def with_train_resolution(entry: Entry, size: Size) -> Entry:
    """Return a copy of `entry` with its bucket."""
    return {**entry, TRAIN_RESOLUTION: list(size)}


def _source(entry: Entry, column: CaptionColumn, *, one_caption: bool) -> str | None:
    """Return the key that the caption of `column` is read from, None if there is no caption.

    `caption` and `tags` that are no captions (other programs store scores there) count as missing.
    """
    if one_caption:
        present = [f"'{key}'" for key in (CAPTION, TAGS) if _is_caption(entry.get(key))]
        return " and ".join(present) or None
    if column.metadata_key in entry:
        return column.metadata_key
    return column.fallback_key if _is_caption(entry.get(column.fallback_key)) else None


def _joined(entry: Entry, separator: str) -> tuple[str, ...]:
    """Return the variants of `caption`, each followed by `tags`."""
    if _source(entry, COLUMN_G, one_caption=True) is None:
        raise KeyError(CAPTION)
    captions = _lines(entry[CAPTION]) if _is_caption(entry.get(CAPTION)) else ("",)
    if not _is_caption(entry.get(TAGS)):
        return captions
    tags = separator.join(line for line in _lines(_tags(entry)) if line)
    return tuple(separator.join(part for part in (caption, tags) if part) for caption in captions)


def _tags(entry: Entry) -> str:
    """Return the tags as one text; a list holds one tag each."""
    tags: str | list[str] = entry[TAGS]
    return tags if isinstance(tags, str) else ", ".join(tags)


def _lines(caption: str | list[str]) -> tuple[str, ...]:
    """Return the variants that a caption holds. Empty lines between others are none."""
    variants = variants_of(caption)
    if len(variants) == 1:
        return variants
    return tuple(line.removesuffix("\r") for line in variants if line.strip()) or ("",)


def _is_caption(value: Any) -> bool:
    """Return whether a value is a text or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def check_entry(entry: Any, where: str | Path, key: str | None = None) -> None:
    """Raise `UserError` for an entry with captions or values of the wrong kind, naming the place `where`.

    That is a text, or the file that has the entry under `key`.
    """
    if key is not None:
        where = f"'{where}', image '{key}'"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object of captions, got {shown(entry)}.", "Correct the entry.")
    for key in (COLUMN_L.metadata_key, COLUMN_G.metadata_key):
        if key in entry and (not _is_caption(entry[key]) or entry[key] == []):
            raise UserError(
                f"{where}: expected {key} to be a text or a list of texts, got {shown(entry[key])}.",
                "Correct the caption.",
            )
    for key, (is_right, expected, remedy) in _OPTIONAL_VALUES.items():
        if key in entry and not is_right(entry[key]):
            raise UserError(f"{where}: expected {key} to be {expected}, got {shown(entry[key])}.", remedy)


def _is_size(value: Any) -> bool:
    # An exact type: True is an int for isinstance.
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(type(side) is int and 0 < side <= _LARGEST_IMAGE for side in value)


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= HEAVIEST  # not NaN


_OPTIONAL_VALUES: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    TRAIN_RESOLUTION: (
        lambda value: _is_size(value) and Size(*value).is_trainable,
        f"[width, height] in pixels, from {MIN_SIDE} to {MAX_SIDE} and at most {MAX_ASPECT} times as long as wide",
        "Correct it, or prepare the buckets again.",
    ),
    IMAGE_SIZE: (_is_size, "[width, height] in pixels", "Correct it, or remove it."),
    LOSS_WEIGHT: (_is_weight, f"a number from 0 to {HEAVIEST}", "Correct it, or remove it."),
    IS_REG: (lambda value: isinstance(value, bool), "true or false", "Correct it, or remove it."),
}
"""What an entry may hold beside captions: the test of a value, what is expected and what to do otherwise."""
