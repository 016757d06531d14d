"""The flags that both captioners share: which images are captioned, what is kept, and how they are read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from library.config.file_names import name_problem
from library.config.magnitudes import MOST_IMAGES_AT_ONCE, MOST_WORKERS
from library.config.options import option, positional


def caption_extension(default: str) -> Any:
    """Return the option for the suffix of caption files."""
    return option(default, "Suffix of the files to write beside the images.", aliases=["--caption_extention"])


def extension_problem(extension: str) -> str | None:
    """Return why `extension` cannot be the suffix of caption files, in a sentence; None if it can."""
    if not extension.startswith(".") or (problem := name_problem(f"x{extension}")) is not None:
        reason = "it must begin with a dot" if not extension.startswith(".") else problem
        return f"--caption_extension is '{extension}': {reason}."
    return None


@dataclass(frozen=True)
class ImageOptions:
    """Which images are captioned."""

    _argument_group_name: ClassVar[str] = "Images"

    train_data_dir: Path = positional("Folder of the images; a caption file is written beside each.")
    recursive: bool = option(False, "Include the images of subfolders.")
    skip_existing: bool = option(True, "Skip images that have a caption file, be it an empty one.")
    overwrite: bool = option(False, "Replace the caption files that exist; the same as --skip_existing=false.")
    batch_size: int = option(1, "Images that the model sees at once.", least=1, most=MOST_IMAGES_AT_ONCE)
    max_data_loader_n_workers: int | None = option(
        None, "Threads that read images ahead. Not given: up to four.", least=0, most=MOST_WORKERS
    )
    debug: bool = option(False, "Print each image with its caption instead of a progress bar.")
    caption_extension: str = caption_extension("")  # that of the encoder, in the classes of each captioner

    @property
    def keeps_existing(self) -> bool:
        """Whether images with a caption file are skipped."""
        return self.skip_existing and not self.overwrite

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if not self.train_data_dir.is_dir():
            yield f"there is no folder '{self.train_data_dir}'; pass the folder of the images."
        if problem := extension_problem(self.caption_extension):
            yield problem
