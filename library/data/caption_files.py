"""Caption files beside the images to a metadata file."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from library.config.errors import UserError, listed
from library.config.leftovers import remove_leftovers
from library.config.options import option, positional
from library.data.caption_sources import CaptionSource, read_caption, was_edited
from library.data.metadata import (
    COLUMN_G,
    COLUMN_L,
    CaptionColumn,
    Metadata,
    keys_without_caption,
    read_metadata,
    write_metadata,
)
from library.data.metadata_lines import is_lines
from library.data.strict_json import read_utf8
from library.images.files import find_images
from library.images.keys import images_of_keys, keys_of_images, same_path
from library.images.kinds import without_suffix

log = logging.getLogger(__name__)

_NUMBERS_OF_FACE = re.compile(r"(_\d+){4}$")


def _caption_extension(default: str) -> Any:
    return option(default, "Suffix of the caption files.", aliases=["--caption_extention"])


@dataclass(frozen=True)
class MergeOptions:
    """What both merge scripts read and write; each has the caption extension of its encoder."""

    _argument_group_name: ClassVar[str] = "Captions to metadata"

    train_data_dir: Path = positional("Folder of the images, with a caption file beside each.")
    out_json: Path = positional(
        "Metadata file to write (JSON, or JSONL if it ends in .jsonl). An existing file is extended."
    )
    in_json: Path | None = option(None, "Metadata file to extend instead of an existing out_json.")
    full_path: bool = option(False, "Use the path of each image as its key instead of the file name without suffix.")
    recursive: bool = option(False, "Include the images of subfolders.")
    caption_extension: str = _caption_extension("")
    remove_missing: bool = option(
        False, "Remove the entries whose image is not in train_data_dir (with --recursive, in its subfolders)."
    )
    allow_missing: bool = option(False, "Skip images without a caption file instead of stopping.")
    debug: bool = option(False, "Print each image with its caption instead of a progress bar.")


@dataclass(frozen=True)
class MergeOptionsL(MergeOptions):
    """`MergeOptions` for the captions of encoder L."""

    caption_extension: str = _caption_extension(COLUMN_L.caption_extension)


@dataclass(frozen=True)
class MergeOptionsG(MergeOptions):
    """`MergeOptions` for the captions of encoder G."""

    caption_extension: str = _caption_extension(COLUMN_G.caption_extension)


def merge_captions(options: MergeOptions, column: CaptionColumn) -> None:
    """Write the caption files of a folder of images into a metadata file, under the key of `column`.

    Existing entries and keys are kept. Raise `UserError`, with nothing written, for images without a caption file
    (unless `allow_missing`), two images with one key, and files that cannot be read or written.
    """
    remove_leftovers(options.out_json.parent)
    images = find_images(options.train_data_dir, recursive=options.recursive)
    metadata = _metadata_to_extend(options)
    image_of = _images_by_key(images, metadata, options)
    captions, sources, without_caption = _read_captions(image_of, options)
    if without_caption and not (options.allow_missing and captions):
        raise UserError(
            f"{len(without_caption)} of {len(images)} images have no {options.caption_extension} file:"
            f" {_quoted(without_caption)}.",
            "Write one beside each (it may be empty), set the right --caption_extension, or skip these images"
            " with --allow_missing.",
        )
    if options.in_json is not None and options.out_json.is_file() and not options.out_json.samefile(options.in_json):
        log.warning("'%s' is replaced by '%s' with these captions", options.out_json, options.in_json)
    removed = [key for key in metadata if key not in image_of] if options.remove_missing else []
    for key in removed:
        del metadata[key]
    _take_over(captions, sources, metadata, column)
    write_metadata(options.out_json, metadata)
    if without_caption:
        log.info(
            "Left out %d images without %s: %s",
            len(without_caption),
            options.caption_extension,
            _quoted(without_caption),
        )
    if removed:
        log.info("Removed %d entries whose image is gone: %s", len(removed), _quoted(removed))
    num_empty = sum(not caption for caption in captions.values())
    log.info(
        "Wrote %d entries to '%s': %s of %d images, %d of them empty",
        len(metadata),
        options.out_json,
        column.metadata_key,
        len(captions),
        num_empty,
    )
    for each in (COLUMN_L, COLUMN_G):
        lacking = keys_without_caption(metadata, each)
        if 0 < len(lacking) < len(metadata):
            log.info(
                "%d entries have no %s; sdxl_train.py refuses such: %s",
                len(lacking),
                each.metadata_key,
                _quoted(lacking),
            )


def _take_over(
    captions: Mapping[str, str], sources: Mapping[str, CaptionSource], metadata: Metadata, column: CaptionColumn
) -> None:
    """Set the captions of files in the metadata, and name those that were edited there and are lost."""
    edited = [
        key
        for key, caption in captions.items()
        if was_edited(entry := metadata.get(key, {}), column) and entry[column.metadata_key] != caption
    ]
    if edited:
        log.warning(
            "%d %s captions were edited in the metadata and are replaced by those of their files: %s",
            len(edited),
            column.letter,
            _quoted(edited),
        )
    for key, caption in captions.items():
        metadata.setdefault(key, {}).update({column.metadata_key: caption, column.source_key: str(sources[key])})


def entries_of_folder(
    folder: Path, extension_l: str, extension_g: str, class_tokens: str | None = None
) -> dict[Path, dict[str, Any]]:
    """Return an entry, as metadata has it, for each image of a folder, from the caption files beside it.

    An image without a file (`caption_file_of`) has `class_tokens` as its caption. Raise `UserError` naming the images
    that have no caption.
    """
    entries: dict[Path, dict[str, Any]] = {
        image: {} for image in find_images(folder, recursive=False, may_recurse=False)
    }
    problems = []
    for column, extension in ((COLUMN_L, extension_l), (COLUMN_G, extension_g)):
        for image, entry in entries.items():
            entry[column.metadata_key] = _caption_beside(image, extension, class_tokens)
        lacking = [image.name for image, entry in entries.items() if entry[column.metadata_key] is None]
        if lacking:
            problems.append(
                f"{len(lacking)} of {len(entries)} images of '{folder}' have no {extension} file, which is the caption "
                f"of {column.letter}: {_quoted(lacking)}"
            )
    if problems:
        raise UserError(
            f"{'; '.join(problems)}.",
            "Write one beside each (it may be empty), or set caption_extension, or class_tokens, the caption of images "
            "without a file.",
        )
    return entries


def caption_file_of(image: Path, extension: str) -> Path:
    """Return the caption file of an image, which need not exist.

    As in kohya's trainers, that of a face image `name_x_y_width_height.jpg` may have the name without the numbers.
    """
    start = without_suffix(image)
    own = Path(f"{start}{extension}")
    without_numbers = _NUMBERS_OF_FACE.sub("", start)
    if without_numbers == start or own.is_file():
        return own
    other = Path(f"{without_numbers}{extension}")
    return other if other.is_file() else own


def _caption_beside(image: Path, extension: str, if_missing: str | None) -> str | None:
    file = caption_file_of(image, extension)
    return read_utf8(file).strip() if file.is_file() else if_missing


def _metadata_to_extend(options: MergeOptions) -> Metadata:
    if options.in_json is not None:
        return read_metadata(options.in_json)
    return read_metadata(options.out_json) if options.out_json.is_file() else {}


def _images_by_key(images: Sequence[Path], metadata: Metadata, options: MergeOptions) -> dict[str, Path]:
    if not any(is_lines(path) for path in (options.in_json, options.out_json) if path is not None):
        return keys_of_images(images, full_path=options.full_path)
    # The keys of JSONL are paths, in the spelling of whoever wrote the file.
    known = {same_path(image): key for key, image in images_of_keys(metadata, options.train_data_dir).items()}
    return {
        known.get(same_path(image), image.relative_to(options.train_data_dir).as_posix()): image for image in images
    }


def _read_captions(
    image_of: Mapping[str, Path], options: MergeOptions
) -> tuple[dict[str, str], dict[str, CaptionSource], list[Path]]:
    """Return the caption of each key, what it was read from, and the images that have no caption file."""
    captions: dict[str, str] = {}
    sources: dict[str, CaptionSource] = {}
    without_caption = []
    from tqdm import tqdm  # which other readers of captions need not wait for

    for key, image in tqdm(image_of.items(), desc="captions", unit="image", disable=options.debug):
        caption_file = without_suffix(image) + options.caption_extension
        if not os.path.exists(caption_file):  # noqa: PTH110
            without_caption.append(image)
            continue
        captions[key], sources[key] = read_caption(caption_file, options.caption_extension)
        if options.debug:
            log.info("%s: %s", image, captions[key])
    return captions, sources, without_caption


def _quoted(paths: Sequence[Path | str]) -> str:
    return listed([f"'{path}'" for path in paths])
