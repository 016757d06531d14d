"""The images of a set with what their captions hold now, kept up with the files."""

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from library.captions.draws import ENCODERS, Encoder
from library.captions.final_captions import CaptionPair, first_text
from library.captions.limits import count_tokens
from library.captions.rules import PairRules
from library.config.errors import UserError
from library.data.caption_files import caption_file_of
from library.data.metadata import COLUMN_G, COLUMN_L, key_of_caption, read_metadata
from library.data.subsets import Subset
from library.editing.caption_edits import tags_of
from library.editing.caption_places import ABSENT, Place, read_places, tag_of
from library.editing.caption_text import CaptionText
from library.images.files import list_files
from library.images.keys import images_of_keys
from library.images.kinds import is_image_of_any_kind
from library.sdxl.sizes import Size

log = logging.getLogger(__name__)

_READ_AT_ONCE = 256  # members between two looks at whether to go on


@dataclass(frozen=True, slots=True)
class CaptionState:
    """A caption as it was read: its variants, None where it does not exist, and the tokens of the longest one in use.

    `tag` tells its bytes from others; `problem` says why it cannot be read.
    """

    tag: str = ABSENT
    variants: tuple[str, ...] | None = None
    num_tokens: int = 0
    problem: str | None = None

    @property
    def is_blank(self) -> bool:
        """Whether there is no text."""
        return not any(self.variants or ())


@dataclass(slots=True, eq=False)
class Member:
    """An image of the set. `key` is what training calls it; sizes and captions are None until they have been read."""

    number: int
    name: str
    key: str
    image: Path
    subset: int
    find_places: Callable[[], dict[Encoder, Place]]
    modified: float = 0.0
    size: Size | None = None
    bucket: Size | None = None
    problem: str | None = None
    captions: dict[Encoder, CaptionState] = field(default_factory=dict)
    _places: dict[Encoder, Place] | None = None

    @property
    def places(self) -> dict[Encoder, Place]:
        """Where the captions lie; found when they are first asked for, so that names need not wait for it."""
        if self._places is None:
            self._places = self.find_places()
        return self._places


class CaptionSet:
    """Images and captions of some subsets. `revision` grows with each change; methods may be called by any thread."""

    def __init__(self, subsets: Sequence[Subset]):
        self.subsets = tuple(subsets)
        self.revision = 0
        self.is_loaded = False
        self._lock = threading.RLock()
        self._members: dict[int, Member] = {}
        self._by_image: dict[tuple[int, str, str], Member] = {}
        self._by_path: dict[Path, list[Member]] | None = None
        self._next = 1

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[Member]:
        """All images, in the order of subsets and names."""
        with self._lock:
            return list(self._members.values())

    def find(self, number: int) -> Member | None:
        """Return an image by its number; None if it is not there, or not any more."""
        with self._lock:
            return self._members.get(number)

    def member(self, number: int) -> Member:
        """Return an image by its number. Raise `UserError` if it is not there, or not any more."""
        member = self.find(number)
        if member is None:
            raise UserError("this image is not in the set any more.", "Choose another one.")
        return member

    def rules(self, member: Member) -> PairRules:
        """Return what training does to the captions of an image."""
        return self.subsets[member.subset].captions

    def folders(self) -> list[Path]:
        """Return the folders that hold what the set is made of."""
        metadata = [each.metadata_file.parent for each in self.subsets if each.metadata_file is not None]
        return list(dict.fromkeys([*(each.image_dir for each in self.subsets), *metadata]))

    def tag_counts(self, encoder: Encoder, members: Iterable[Member] | None = None) -> Counter[str]:
        """Return how many captions of one encoder hold each tag, in any of their variants."""
        counts: Counter[str] = Counter()
        for member in self.members if members is None else members:
            state = member.captions.get(encoder)
            if state is not None and state.variants:
                separator = self.rules(member).of(encoder).caption_separator
                counts.update({tag for variant in state.variants for tag in tags_of(variant, separator)})
        return counts

    # -- reading ------------------------------------------------------------------------------------------------------

    def list_images(self) -> None:
        """Find the images of every subset; those that are known keep their numbers and what was read of them.

        A folder or metadata file that cannot be read is reported, and leaves the set without its images.
        """
        found: list[Member] = []
        for number, subset in enumerate(self.subsets):
            try:
                found += _members_of(subset, number)
            except UserError as error:
                log.warning("%s", error)
        keys: Counter[str] = Counter()
        with self._lock:
            members: dict[int, Member] = {}
            for member in found:
                keys[member.key] += 1
                if keys[member.key] > 1:
                    member.key = f"{member.key} ({keys[member.key]})"
                known = self._by_image.get(_identity(member))
                if known is None or known.places != member.places:
                    member.number, self._next = self._next, self._next + 1
                    known = member
                members[known.number] = known
            self._members = members
            self._by_image |= {_identity(member): member for member in members.values()}  # a disk may come back
            self._by_path = None
            self.revision += 1

    def _of_path(self, path: Path) -> list[Member]:
        """Return the images that a file is, or holds a caption of. The lock is to be held."""
        if self._by_path is None:
            self._by_path = defaultdict(list)
            for member in self._members.values():
                for each in {member.image, *(place.path for place in member.places.values())}:
                    self._by_path[each].append(member)
        return self._by_path.get(path, [])

    def load(self, progress: Callable[[int, int], bool] = lambda done, total: True) -> None:
        """Read all captions, then all image sizes. `progress` is told how far it is and whether to go on."""
        members = self.members
        for what, weight in ((self._read_captions, 0), (self._read_images, 1)):
            for first in range(0, len(members), _READ_AT_ONCE):
                part = members[first : first + _READ_AT_ONCE]
                what(part)
                self.revision += 1
                if not progress(len(members) * weight + first + len(part), 2 * len(members)):
                    return
        self.is_loaded = True

    def refresh(self, paths: Iterable[Path]) -> list[Member]:
        """Read again what some files belong to; return the images of which anything has changed.

        A path of an image that is not known, or is gone, has the folders listed again.
        """
        known, needs_listing = [], False
        with self._lock:
            for path in paths:
                members = self._of_path(path)
                known += members
                is_new = not members and is_image_of_any_kind(path.name)
                is_gone = any(member.image == path for member in members) and not path.exists()
                is_list = any(each.metadata_file == path or each.image_dir == path for each in self.subsets)
                needs_listing = needs_listing or is_new or is_gone or is_list
            before = set(self._members.values())
        if needs_listing:
            self.list_images()
        with self._lock:
            added = [member for member in self._members.values() if member not in before]
            gone = before - set(self._members.values())
        old = {member: (dict(member.captions), member.modified) for member in known}
        self._read_captions(list(dict.fromkeys([*known, *added])))
        self._read_images([*added, *(each for each in dict.fromkeys(known) if _modified(each.image) != each.modified)])
        changed = [each for each in old if each not in gone and old[each] != (each.captions, each.modified)]
        changed += [*added, *gone]
        if changed:
            self.revision += 1
        return changed

    def reread(self, places: Iterable[Place]) -> list[Member]:
        """Read the captions at some places again; return the images that have one there."""
        with self._lock:
            wanted = set(places)
            paths = {place.path for place in wanted}
            members = [each for path in paths for each in self._of_path(path) if wanted & set(each.places.values())]
        self._read_captions(members)
        self.revision += 1
        return members

    def _read_captions(self, members: Sequence[Member]) -> None:
        contents = read_places([place for member in members for place in member.places.values()])
        for member in members:
            captions = {}
            for encoder, place in member.places.items():
                content = contents[place]
                captions[encoder] = (
                    CaptionState(problem=str(content))
                    if isinstance(content, UserError)
                    else caption_state(content, place, self.rules(member), encoder)
                )
            member.captions = captions

    def _read_images(self, members: Sequence[Member]) -> None:
        from library.images.reading import read_size  # Pillow and numpy, which the first page need not wait for

        for member in members:
            member.modified = _modified(member.image)
            try:
                member.size = read_size(member.image)
                member.bucket = self.subsets[member.subset].rule.assign(member.size).bucket
                member.problem = None
            except UserError as error:
                member.problem = str(error)


def caption_state(content: bytes | None, place: Place, rules: PairRules, encoder: Encoder) -> CaptionState:
    """Return what an editor knows of a caption: nothing is raised for one that cannot be read."""
    if content is None:
        return CaptionState()
    try:
        variants = CaptionText.parse(content, f"'{place}'").variants
        in_use = variants if rules.of(encoder).enable_wildcard else variants[:1]
        num_tokens = max(count_tokens(text_of(variant, rules, encoder), rules.of(encoder)) for variant in in_use)
    except UserError as error:
        return CaptionState(tag=tag_of(content), problem=str(error))
    return CaptionState(tag_of(content), variants, num_tokens)


def text_of(variant: str, rules: PairRules, encoder: Encoder) -> str:
    """Return the final text that one variant has without chance."""
    return first_text(CaptionPair((variant,), (variant,)), rules, encoder)


def _members_of(subset: Subset, number: int) -> Iterator[Member]:
    if subset.metadata_file is not None:
        metadata = read_metadata(subset.metadata_file)
        for key, image in images_of_keys(metadata, subset.image_dir).items():
            entries: dict[Encoder, Place] = {
                encoder: Place(subset.metadata_file, key, key_of_caption(metadata[key], column) or column.metadata_key)
                for encoder, column in zip(ENCODERS, (COLUMN_L, COLUMN_G), strict=True)
            }
            yield Member(0, _name(image, subset), f"{subset.key_prefix}{key}", image, number, partial(dict, entries))
        return
    for image in list_files(subset.image_dir, recursive=False).images:
        files = partial(_files_beside, image, subset)
        yield Member(0, image.name, f"{subset.key_prefix}{image.stem}", image, number, files)


def _files_beside(image: Path, subset: Subset) -> dict[Encoder, Place]:
    return {
        encoder: Place(caption_file_of(image, extension))
        for encoder, extension in zip(ENCODERS, (subset.extension_l, subset.extension_g), strict=True)
    }


def _name(image: Path, subset: Subset) -> str:
    return image.relative_to(subset.image_dir).as_posix() if image.is_relative_to(subset.image_dir) else image.name


def _identity(member: Member) -> tuple[int, str, str]:
    return member.subset, str(member.image), member.key


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
