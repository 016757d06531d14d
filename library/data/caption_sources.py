"""Caption files that have changed since the metadata was made from them."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from library.config.digests import digest
from library.config.errors import UserError, listed
from library.data.metadata import (
    COLUMN_G,
    COLUMN_L,
    CaptionColumn,
    Entry,
    Metadata,
    read_metadata,
    variants_for,
    write_metadata,
)
from library.data.metadata_lines import is_lines
from library.data.strict_json import decoded_utf8
from library.images.files import list_files
from library.images.keys import images_of_keys, is_file, same_path
from library.images.kinds import without_suffix

log = logging.getLogger(__name__)

_DIGEST_BYTES = 8
_EXTENSIONS = (COLUMN_L.caption_extension, COLUMN_G.caption_extension)


class CaptionSource(NamedTuple):
    """What the metadata records of the file that a caption was read from.

    The digest is that of the caption and decides whether the file has changed. Size in bytes and modification time (in
    nanoseconds) only spare reading the file, and need not survive a copy to another machine.
    """

    suffix: str
    size: int
    modified: int
    caption_digest: str

    def __str__(self) -> str:
        return f"{self.suffix} {self.size} {self.modified} {self.caption_digest}"

    @classmethod
    def parse(cls, text: object) -> "CaptionSource | None":
        """Return the record of a text, or None if it is none."""
        parts = text.rsplit(" ", 3) if isinstance(text, str) else []
        if len(parts) != 4 or not all(part.isascii() and part.isdigit() for part in parts[1:3]):
            return None
        return cls(parts[0], int(parts[1]), int(parts[2]), parts[3])


class CaptionFile(NamedTuple):
    """A caption file beside an image, its state, and what the metadata records of it, if anything."""

    key: str
    column: CaptionColumn
    path: str
    suffix: str
    size: int
    modified: int
    recorded: CaptionSource | None

    def may_have_changed(self, since: int) -> bool:
        """Return whether size or time is not the recorded one, or, without record, the time is later than `since`."""
        if self.recorded is None:
            return self.modified > since
        return (self.size, self.modified) != (self.recorded.size, self.recorded.modified)

    def differs(self, caption: str, entry: Entry) -> bool:
        """Return whether the caption of the file is another one than that of the metadata entry."""
        if self.recorded is not None:
            return self.recorded.caption_digest != _caption_digest(caption)
        return variants_for(entry, self.column) != variants_for({self.column.metadata_key: caption}, self.column)


def read_caption(path: Path | str, suffix: str) -> tuple[str, CaptionSource]:
    """Return the caption in a file, and what metadata records of it. Raise `UserError` if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            state = os.fstat(file.fileno())  # before reading: a change in between is noticed later
            content = file.readall() or b""
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read '{path}': {getattr(error, 'strerror', None) or error}.", "Check the path."
        ) from error
    caption = decoded_utf8(content, path).strip()
    return caption, CaptionSource(suffix, state.st_size, state.st_mtime_ns, _caption_digest(caption))


def was_edited(entry: Entry, column: CaptionColumn) -> bool:
    """Return whether the caption of an entry is another one than what was read from its file."""
    recorded, caption = CaptionSource.parse(entry.get(column.source_key)), entry.get(column.metadata_key)
    if recorded is None or caption is None:
        return False
    return not isinstance(caption, str) or _caption_digest(caption) != recorded.caption_digest


def warn_of_suspects(path: Path, suspects: Iterable[tuple[CaptionFile, Entry]]) -> None:
    """Name the caption files, of suspects with their entries in the metadata `path`, that differ from these."""
    changed = []
    for suspect, entry in suspects:
        try:
            caption, _ = read_caption(suspect.path, suspect.suffix)
            is_changed = suspect.differs(caption, entry)
        except UserError:  # of the file; --update_captions tells the reason
            is_changed = True
        if is_changed:
            changed.append(f"'{suspect.path}'")
    if changed:
        log.warning(
            "%d caption files have changed since they were merged into '%s', and their old captions are trained: %s. "
            "--update_captions takes the new ones over.",
            len(changed),
            path,
            listed(changed),
        )


def update_captions(path: Path, folder: Path, extensions: tuple[str, str] = _EXTENSIONS) -> None:
    """Take the changed caption files of the images in `folder` over into the metadata `path`.

    Images that lie beside those of the metadata, are not in it and have both caption files are added. The metadata is
    written only if anything has changed. Raise `UserError` for files that cannot be read or written.
    """
    metadata = read_metadata(path)
    image_of = images_of_keys(metadata, folder)
    changed, num_read = [], 0
    for suspect in _suspects(path, metadata, image_of, extensions):
        caption, source = read_caption(suspect.path, suspect.suffix)
        entry = metadata[suspect.key]
        if suspect.differs(caption, entry):
            entry[suspect.column.metadata_key] = caption
            changed.append(f"'{suspect.path}'")
        entry[suspect.column.source_key] = str(source)
        num_read += 1
    added = _entries_of_new_images(path, metadata, image_of, folder, extensions)
    metadata.update(added)
    if num_read or added:
        write_metadata(path, metadata)
    if not (changed or added):
        log.info("captions: no caption file has changed since it was merged into '%s'", path)
    if changed:
        log.info("captions: %d changed files are taken over into '%s': %s", len(changed), path, listed(changed))
    if added:
        log.info("captions: %d new images are added to '%s': %s", len(added), path, listed(list(added)))


def _suspects(
    path: Path, metadata: Metadata, image_of: Mapping[str, Path], extensions: tuple[str, str]
) -> Iterator[CaptionFile]:
    """Yield the caption files whose size or time is not the recorded one, or, without record, later than `path`'s."""
    from tqdm import tqdm  # which other readers of captions need not wait for

    since = path.stat().st_mtime_ns
    images = tqdm(image_of.items(), "comparing caption files", unit="image", disable=None, delay=1)
    for key, image in images:
        files = caption_files_beside(without_suffix(image), key, metadata[key], extensions)
        yield from (file for file in files if file.may_have_changed(since))


def caption_files_beside(
    start: str,
    key: str,
    entry: Entry,
    extensions: tuple[str, str] = _EXTENSIONS,
    present: Container[str] | None = None,
) -> Iterator[CaptionFile]:
    """Yield the caption files of the image with a key: their paths are `start` and a suffix.

    With `present` only the suffixes in it are looked for, but for those of two dots.
    """
    for column, extension in zip((COLUMN_L, COLUMN_G), extensions, strict=True):
        recorded = CaptionSource.parse(entry.get(column.source_key))
        suffix = extension if recorded is None else recorded.suffix
        if present is not None and suffix not in present and suffix.rfind(".") == 0:
            continue
        try:
            state = os.stat(start + suffix)  # noqa: PTH116
        except (OSError, ValueError):  # no caption file, or no name for one
            continue
        if stat.S_ISREG(state.st_mode):
            yield CaptionFile(key, column, start + suffix, suffix, state.st_size, state.st_mtime_ns, recorded)


def _entries_of_new_images(
    path: Path, metadata: Metadata, image_of: Mapping[str, Path], folder: Path, extensions: tuple[str, str]
) -> Metadata:
    known = {same_path(image) for image in image_of.values()}
    captioned = {
        image: [image.with_name(image.stem + extension) for extension in extensions]
        for image in _images_beside(image_of, folder)
        if same_path(image) not in known
    }
    new = {image: files for image, files in captioned.items() if all(map(is_file, files))}
    key_of = {image: _key_like(image, path, image_of, folder) for image in new}
    counts = Counter(key_of.values())
    shared = [f"'{image}'" for image, key in key_of.items() if key in metadata or counts[key] > 1]
    if shared:
        log.warning("%d new images have the key of another one and are left out: %s", len(shared), listed(shared))
    entries: Metadata = {}
    for image, files in new.items():
        if key_of[image] in metadata or counts[key_of[image]] > 1:
            continue
        entry = entries.setdefault(key_of[image], {})
        for column, file, extension in zip((COLUMN_L, COLUMN_G), files, extensions, strict=True):
            entry[column.metadata_key], source = read_caption(file, extension)
            entry[column.source_key] = str(source)
    return entries


def _images_beside(image_of: Mapping[str, Path], folder: Path) -> Iterator[Path]:
    """Yield the images of the folders that hold images of the metadata; subfolders may hold what is not wanted."""
    folders = dict.fromkeys([folder, *(image.parent for image in image_of.values())])
    for each in {same_path(each): each for each in folders}.values():
        yield from list_files(each, recursive=False).images


def _key_like(image: Path, path: Path, image_of: Mapping[str, Path], folder: Path) -> str:
    """Return a key for a new image in the style of the others: file name, path as it was passed, or relative path."""
    key, example = next(iter(image_of.items()), ("", Path()))
    if not is_lines(path) and key in ("", example.stem):
        return image.stem
    is_inside = image.is_relative_to(folder)
    return str(image) if key == str(example) or not is_inside else image.relative_to(folder).as_posix()


def _caption_digest(caption: str) -> str:
    return digest([caption.encode("utf-8", errors="surrogatepass")], _DIGEST_BYTES).hex()
