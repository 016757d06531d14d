"""The metadata file: one JSON object that leads from the key of an image to its captions and its training size."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from library.config.atomic_files import remove_leftovers, write_text
from library.config.errors import UserError
from library.config.options import option, positional
from library.data.images import find_images, list_images
from library.sdxl.sizes import Size

Entry = dict[str, Any]
Metadata = dict[str, Entry]

TRAIN_RESOLUTION = "train_resolution"


@dataclass(frozen=True)
class Encoder:
    """One of the two text encoders, and where its captions are kept: metadata key and suffix of the caption files."""

    letter: str
    metadata_key: str
    caption_extension: str


ENCODER_L = Encoder("L", "captionL", ".txt")
ENCODER_G = Encoder("G", "captionG", ".caption")


def _caption_extension(default: str) -> Any:
    return option(default, "How the names of caption files end.", aliases=["--caption_extention"])


@dataclass(frozen=True)
class MergeOptions:
    """What both merge scripts read and write; the caption extension is that of the encoder."""

    _argument_group_name: ClassVar[str] = "Captions to metadata"

    train_data_dir: Path = positional("Folder of the images; each caption lies beside its image.")
    out_json: Path = positional("Metadata file to write. If it exists it is extended.")
    in_json: Path | None = option(None, "Metadata file to extend, in place of an existing out_json.")
    full_path: bool = option(False, "Use the path of each image as its key, not the file name without suffix.")
    recursive: bool = option(False, "Take the images of subfolders too.")
    caption_extension: str = _caption_extension("")
    allow_missing: bool = option(False, "Leave out images that have no caption file, instead of stopping.")
    debug: bool = option(False, "Print each image with its caption, in place of the progress bar.")


@dataclass(frozen=True)
class MergeOptionsL(MergeOptions):
    """`MergeOptions` for the captions of encoder L."""

    caption_extension: str = _caption_extension(ENCODER_L.caption_extension)


@dataclass(frozen=True)
class MergeOptionsG(MergeOptions):
    """`MergeOptions` for the captions of encoder G."""

    caption_extension: str = _caption_extension(ENCODER_G.caption_extension)


def read_metadata(path: Path) -> Metadata:
    """The entries of a metadata file, checked, unknown keys of entries included.

    Raises `UserError` naming file, image key and what was expected: for a file that cannot be read or is not UTF-8 (a
    byte-order mark is fine), broken JSON, a key that stands twice in one object, and values of the wrong kind.
    """
    try:
        content = json.loads(
            _read_utf8(path, if_missing="Check the path, or make it with the merge scripts of finetune/."),
            object_pairs_hook=_object_without_repeated_keys,
        )
    except json.JSONDecodeError as error:
        raise UserError(
            f"'{path}' is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.",
            "Mend the line, or remove the file and make it again.",
        ) from error
    except (RecursionError, ValueError) as error:  # thousands of brackets, a number of thousands of digits
        raise UserError(f"'{path}' is not metadata ({error}).", "Make it again by the merge scripts.") from error
    except _RepeatedKey as error:
        raise UserError(
            f"'{path}': the key {error} stands twice in one object.", "Remove or rename one of the two."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}': expected an object of image keys, got {_shown(content)}.", "Give a metadata file.")
    for key, entry in content.items():
        _check_entry(entry, where=f"'{path}', image '{key}'")
    return content


def write_metadata(path: Path, metadata: Mapping[str, Entry]) -> None:
    """Write `metadata` as JSON, whole or not at all: indent 2, characters of all scripts as they are.

    Halves of a surrogate pair, which UTF-8 cannot hold, stay escapes. Raises `UserError` if `path` cannot be written.
    """
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    write_text(path, re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text) + "\n")


def caption_l(entry: Entry) -> str | None:
    """The caption for encoder L; None if there is none, which is not the same as an empty one."""
    return entry.get(ENCODER_L.metadata_key)


def caption_g(entry: Entry) -> str | None:
    """The caption for encoder G; None if there is none, which is not the same as an empty one."""
    return entry.get(ENCODER_G.metadata_key)


def keys_without_caption(metadata: Metadata, encoder: Encoder) -> list[str]:
    """The keys of the entries that have no caption for `encoder`; an empty one is a caption."""
    return [key for key, entry in metadata.items() if encoder.metadata_key not in entry]


def train_resolution(entry: Entry) -> Size | None:
    """The bucket that was chosen for the image; None before buckets were prepared."""
    return Size(*entry[TRAIN_RESOLUTION]) if TRAIN_RESOLUTION in entry else None


def with_train_resolution(entry: Entry, size: Size) -> Entry:
    """A copy of `entry` with its bucket."""
    return {**entry, TRAIN_RESOLUTION: list(size)}


def image_key(path: Path, *, full_path: bool) -> str:
    """The key of an image: its name without suffix, or with `full_path` its path as given."""
    return str(path) if full_path else path.stem


def keys_of_images(images: Sequence[Path], *, full_path: bool) -> dict[str, Path]:
    """Each image by its key, in the order given; raises `UserError` naming both if two have the same key."""
    image_of: dict[str, Path] = {}
    for image in images:
        first = image_of.setdefault(image_key(image, full_path=full_path), image)
        if first is not image:
            raise UserError(
                f"'{first}' and '{image}' have the same key '{image_key(image, full_path=full_path)}'.",
                "Rename or remove one of them, or use paths as keys with --full_path.",
            )
    return image_of


def images_by_stem(folder: Path) -> dict[str, list[Path]]:
    """The images of each file name without suffix: those of `folder` itself if there are any, else of its subfolders.

    An index for `resolve_image`. Raises `UserError` if the folder does not exist.
    """
    index: dict[str, list[Path]] = {}
    for image in list_images(folder, recursive=False):
        index.setdefault(image.stem, []).append(image)
    at_top = frozenset(index)
    for image in list_images(folder, recursive=True):
        if image.stem not in at_top:
            index.setdefault(image.stem, []).append(image)
    return index


def resolve_image(key: str, folder: Path, by_stem: Mapping[str, Sequence[Path]]) -> Path | None:
    """The image that a metadata key means, None if there is no such file.

    A key is a file name without suffix (looked up in `by_stem`, of `images_by_stem`), or a path: absolute, or relative
    to the current folder or to `folder`, with slashes or backslashes. Raises `UserError` if two images share the name,
    or if the path climbs out of `folder` by "..".
    """
    named = by_stem.get(key, ())
    if len(named) > 1:
        raise UserError(
            f"the key '{key}' could mean '{named[0]}' or '{named[1]}'.", "Rename one, or make keys with --full_path."
        )
    if named:
        return named[0]
    spellings = [Path(key), Path(key.replace("\\", "/"))]
    candidates = [start / path for path in spellings for start in (Path(), folder)]
    found = [path for path in candidates if is_file(path)]
    inside = [path for path in found if ".." not in path.parts or _lies_in(path, folder)]
    if found and not inside:
        raise UserError(
            f"the key '{key}' leads to '{found[0]}', outside the image folder '{folder}'.",
            "Correct the key, or give the folder that holds the image.",
        )
    return inside[0] if inside else None


def is_file(path: Path) -> bool:
    """Whether there is such a file; what no file system would take for a name leads to none."""
    try:
        return path.is_file()
    except OSError:  # too long
        return False


def merge_captions(options: MergeOptions, encoder: Encoder) -> None:
    """Write the caption files of a folder of images into a metadata file, under the key of `encoder`.

    Entries and keys that are there already are kept; what is written, and what is left out, is printed. Raises
    `UserError`, with nothing written, for images without caption file (unless `allow_missing`), two images of one key,
    and files that cannot be read or written.
    """
    remove_leftovers(options.out_json.parent)
    images = find_images(options.train_data_dir, recursive=options.recursive)
    image_of = keys_of_images(images, full_path=options.full_path)
    metadata = _metadata_to_extend(options)
    captions, without_caption = _read_captions(image_of, options)
    if without_caption and not (options.allow_missing and captions):
        raise UserError(
            f"{len(without_caption)} of {len(images)} images have no {options.caption_extension} file:"
            f" {_quoted(without_caption)}.",
            "Write one beside each (it may be empty), give the right --caption_extension, or leave these images out"
            " with --allow_missing.",
        )
    for key, caption in captions.items():
        metadata.setdefault(key, {})[encoder.metadata_key] = caption
    write_metadata(options.out_json, metadata)
    if without_caption:
        print(f"Left out {len(without_caption)} images without {options.caption_extension}: {_quoted(without_caption)}")
    num_empty = sum(not caption for caption in captions.values())
    print(
        f"Wrote {len(metadata)} entries to '{options.out_json}':"
        f" {encoder.metadata_key} of {len(captions)} images, {num_empty} of them empty"
    )
    for each in (ENCODER_L, ENCODER_G):
        lacking = keys_without_caption(metadata, each)
        if 0 < len(lacking) < len(metadata):
            print(f"{len(lacking)} entries have no {each.metadata_key}; sdxl_train.py refuses such: {_quoted(lacking)}")


def _metadata_to_extend(options: MergeOptions) -> Metadata:
    if options.in_json is not None:
        return read_metadata(options.in_json)
    return read_metadata(options.out_json) if options.out_json.is_file() else {}


def _read_captions(image_of: Mapping[str, Path], options: MergeOptions) -> tuple[dict[str, str], list[Path]]:
    """The caption of each key, and the images that have no caption file."""
    captions: dict[str, str] = {}
    without_caption = []
    for key, image in tqdm(image_of.items(), desc="captions", unit="image", disable=options.debug):
        caption_file = image.parent / f"{image.stem}{options.caption_extension}"
        if not caption_file.exists():
            without_caption.append(image)
            continue
        captions[key] = _read_utf8(caption_file).strip()
        if options.debug:
            print(f"{image}: {captions[key]}")
    return captions, without_caption


def _read_utf8(path: Path, if_missing: str = "Check the path.") -> str:
    """The text without a byte-order mark, line ends as "\\n"."""
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}.", "Save it as UTF-8."
        ) from error
    except OSError as error:
        remedy = if_missing if isinstance(error, FileNotFoundError) else "Check the path."
        raise UserError(f"cannot read '{path}': {error.strerror or error}.", remedy) from error


class _RepeatedKey(Exception):
    pass


def _object_without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _RepeatedKey(f"'{key}'")
        result[key] = value
    return result


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object of captions, got {_shown(entry)}.", "Correct the entry.")
    for key in (ENCODER_L.metadata_key, ENCODER_G.metadata_key):
        if not isinstance(entry.get(key, ""), str):
            raise UserError(f"{where}: expected {key} to be text, got {_shown(entry[key])}.", "Correct the caption.")
    if TRAIN_RESOLUTION in entry and not _is_size(entry[TRAIN_RESOLUTION]):
        raise UserError(
            f"{where}: expected {TRAIN_RESOLUTION} to be [width, height] in pixels,"
            f" got {_shown(entry[TRAIN_RESOLUTION])}.",
            "Correct it, or prepare the buckets again.",
        )


def _is_size(value: Any) -> bool:
    # An exact type: True is an int for isinstance.
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _lies_in(path: Path, folder: Path) -> bool:
    # By the names alone: an image that is a link to a file elsewhere does lie in its folder.
    return Path(os.path.normpath(path.absolute())).is_relative_to(os.path.normpath(folder.absolute()))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _quoted(paths: Sequence[Path | str]) -> str:
    return ", ".join(f"'{path}'" for path in paths)
