"""The flags of the tagger: which model, and which of its tags are written in which order."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.annotation.image_options import ImageOptions, caption_extension
from library.annotation.tag_texts import SEPARATOR, split_tags
from library.config.magnitudes import MOST_IMAGES_AT_ONCE
from library.config.options import option
from library.config.spellings import Spellings

THRESHOLD_HELP = "Least probability of a tag of {}. Not given: --thresh."


@dataclass(frozen=True)
class TagImageOptions(ImageOptions):
    """`ImageOptions` for tags, which are those of encoder L unless told otherwise."""

    caption_extension: str = caption_extension(".txt")
    batch_size: int = option(8, "Images that the model sees at once.", least=1, most=MOST_IMAGES_AT_ONCE)


@dataclass(frozen=True)
class TaggerOptions:
    """Which model tags."""

    _argument_group_name: ClassVar[str] = "Model"

    model_dir: Path = option(
        Path("wd14_tagger_model"),
        "Folder of the model: model.onnx and selected_tags.csv. With --repo_id, where that model is downloaded to.",
    )
    repo_id: str | None = option(
        None,
        "Model of the Hugging Face Hub to download, as SmilingWolf/wd-vit-tagger-v3. Without it nothing is fetched.",
    )
    force_download: bool = option(False, "Download the model of --repo_id again, even if it is there.")
    onnx: bool = option(True, "Run the model in ONNX Runtime, which is the only way here.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if not self.onnx:
            yield "--onnx=false asks for TensorFlow, in which taggers are not run here. Leave it off."
        if self.force_download and not self.repo_id:
            yield "--force_download needs --repo_id: name the model to download."


@dataclass(frozen=True)
class TagOptions:
    """Which tags are written."""

    _argument_group_name: ClassVar[str] = "Tags"

    thresh: float = option(0.35, "Least probability of a tag.", least=0, most=1)
    general_threshold: float | None = option(
        None, "Least probability of a tag that is no character. Not given: --thresh.", least=0, most=1
    )
    character_threshold: float | None = option(
        None, "Least probability of a tag that is a character. Not given: --thresh.", least=0, most=1
    )
    remove_underscore: bool = option(False, "Write spaces for underscores, but in faces such as ^_^.")
    undesired_tags: str = option("", "Tags that are never written, separated by commas.")
    always_first_tags: str | None = option(
        None, "Tags that stand first where they are written, in this order, separated by commas: 1girl,1boy."
    )
    character_tags_first: bool = option(False, "Write characters before the other tags.")
    character_tag_expand: bool = option(
        False, "Write the parentheses at the end of a character as another tag: name_(series) becomes name, series."
    )
    use_rating_tags: bool = option(False, "Write the rating (general, sensitive ...) first.")
    use_rating_tags_as_last_tag: bool = option(False, "Write the rating last.")
    tag_replacement: str | None = option(
        None,
        "Tags to write in place of others: old,new;old,new. A comma or semicolon that belongs to a tag is written with "
        "a backslash before it.",
    )
    append_tags: bool = option(
        False, "Add tags to the files that exist, behind those that they hold; --skip_existing does not count then."
    )
    caption_separator: str = option(SEPARATOR, "What stands between two tags, spaces included.")
    frequency_tags: bool = option(False, "List every tag with its number of images at the end, not only the first 20.")

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if self.use_rating_tags and self.use_rating_tags_as_last_tag:
            yield "--use_rating_tags and --use_rating_tags_as_last_tag exclude each other. Keep one of them."
        if not self.caption_separator.strip():
            yield "--caption_separator must hold a character that is no space: tags hold spaces."
        if "\n" in self.caption_separator:
            yield "--caption_separator must not hold a line end: lines are variants of a caption."
        for pair in split_escaped(self.tag_replacement or "", ";"):
            if len(split_escaped(pair, ",")) != 2:
                yield f"--tag_replacement expects old,new;old,new, not '{pair}'."

    @property
    def replacements(self) -> dict[str, str]:
        """The new tag for each old one of `tag_replacement`."""
        pairs = (split_escaped(pair, ",") for pair in split_escaped(self.tag_replacement or "", ";"))
        return {unescaped(old).strip(): unescaped(new).strip() for old, new in pairs}

    @property
    def undesired(self) -> frozenset[str]:
        """The tags of `undesired_tags`."""
        return frozenset(self._listed(self.undesired_tags))

    @property
    def first(self) -> list[str]:
        """The tags of `always_first_tags`."""
        return self._listed(self.always_first_tags or "")

    def _listed(self, text: str) -> list[str]:
        return split_tags(text, self.caption_separator)


def conflicts(images: TagImageOptions, model: TaggerOptions, tags: TagOptions) -> Iterator[str]:
    """Yield what cannot work together."""
    if tags.append_tags and images.overwrite:
        yield "--append_tags keeps what --overwrite replaces. Keep one of them."


def split_escaped(text: str, separator: str) -> list[str]:
    """Return the parts of a text, empty ones left out; a separator behind a backslash separates nothing."""
    parts, start, place = [], 0, 0
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] == separator:
            parts.append(text[start:place])
            start = place + 1
        place += 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]


def unescaped(text: str) -> str:
    """Return a text without the backslashes before commas and semicolons."""
    return text.replace("\\,", ",").replace("\\;", ";")


TAGGER_SPELLINGS = Spellings(
    refused={
        "--pin_memory": "is for models of PyTorch; ONNX Runtime copies images by itself. Leave it off.",
    }
)
