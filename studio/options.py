"""The flags of the studio, and the subsets that they name."""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from library.captions.options import CaptionOptions, caption_extension, resolve
from library.config.errors import UserError
from library.config.magnitudes import MOST_SEED
from library.config.options import option, positional
from library.data.dataset_config import read_dataset_config
from library.data.loader_options import LoaderOptions
from library.data.repeat_folders import repeat_folders
from library.data.subsets import Subset
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketOptions, parse_resolution
from library.images.files import has_images, list_files

_ANY_ADDRESS = ("0.0.0.0", "::")  # told apart, not bound


@dataclass(frozen=True)
class StudioOptions:
    """What the studio opens."""

    _argument_group_name: ClassVar[str] = "Set"

    image_dirs: list[Path] = positional("Folders of images with their caption files. Left out with --dataset_config.")
    in_json: Path | None = option(
        None, "Edit the captions in this metadata file (JSON or JSONL), not caption files; images are in the folder."
    )
    dataset_config: Path | None = option(
        None, "Open the folders of this data set file (TOML or JSON), with their rules, in place of folders."
    )
    recursive: bool = option(False, "Open the subfolders that hold images too, each as a subset.")
    resolution: str = option("1024,1024", "Training size, as width,height: decides buckets and crops.")
    enable_bucket: bool = option(True, "Show buckets. Otherwise show the crop to --resolution.")
    seed: int = option(0, "Seed of the run whose captions are drawn.", least=0, most=MOST_SEED)

    @property
    def names_a_set(self) -> bool:
        """Whether there are images to look at."""
        return bool(self.image_dirs) or self.dataset_config is not None

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.dataset_config is not None and (self.image_dirs or self.in_json or self.recursive):
            yield "--dataset_config names all folders. Leave out the other folders, --in_json and --recursive."
        if self.in_json is not None and len(self.image_dirs) != 1:
            yield "--in_json needs one folder, that of its images."
        for folder in self.image_dirs or ():
            if not folder.is_dir():
                yield f"there is no folder '{folder}'. Pass a folder of images."
        try:
            parse_resolution(self.resolution)
        except UserError as error:
            yield f"--resolution: {error}"


@dataclass(frozen=True)
class RunsOptions:
    """Which runs are shown, and where new ones may read and write."""

    _argument_group_name: ClassVar[str] = "Runs"

    run_dirs: list[Path] | None = option(
        None, "Find, start and show the runs below these folders: output folders, or folders that hold them."
    )
    model_dirs: list[Path] | None = option(
        None, "Let runs that are started here read models and other files below these folders too, with --run_dirs."
    )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        for flag, folders in (("--run_dirs", self.run_dirs), ("--model_dirs", self.model_dirs)):
            for folder in folders or ():
                if not folder.is_dir():
                    yield f"{flag}: there is no folder '{folder}'. Make it, or pass another."
        if self.model_dirs and not self.run_dirs:
            yield "--model_dirs has no effect without --run_dirs."


def set_conflicts(options: StudioOptions, runs: RunsOptions) -> Iterator[str]:
    """Yield what is wrong between what is opened of sets and of runs."""
    if not options.names_a_set and not runs.run_dirs:
        yield "no folder is named. Pass a folder of images, --dataset_config, or --run_dirs."


@dataclass(frozen=True)
class ServerOptions:
    """Who can reach the studio."""

    _argument_group_name: ClassVar[str] = "Server"

    port: int = option(8890, "Port of the page. 0 takes any that is free.", least=0, most=65535)
    listen: str | None = option(
        None, "Listen at this address, for other machines to reach the page. Default: this machine alone."
    )
    allowed_hosts: list[str] | None = option(
        None, "Names or addresses by which other machines reach the page, with --listen. Default: its address."
    )
    token: str | None = option(
        None,
        "Secret that the link to the page holds, 16 characters or more. Default: a new one each time.",
        secret=True,
    )
    open_browser: bool = option(False, "Open the page in the browser.")

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.token is not None and (
            len(self.token) < 16 or not self.token.isascii() or not self.token.isprintable()
        ):
            yield "--token needs 16 characters of ASCII or more. Leave it out for a random one."
        if self.listen is not None and not _is_address(self.listen):
            yield f"--listen expects an address such as 192.168.0.10, not '{self.listen}'."
        if self.listen in _ANY_ADDRESS and not self.allowed_hosts:
            yield f"--listen={self.listen} needs --allowed_hosts: the names by which the page is reached."
        if self.allowed_hosts and self.listen is None:
            yield "--allowed_hosts has no effect without --listen."

    @property
    def hosts(self) -> list[str]:
        """The names that a request may have in its Host header, without the port."""
        own = [] if self.listen in (None, *_ANY_ADDRESS) else [str(self.listen)]
        return ["127.0.0.1", "localhost", "[::1]", *own, *(self.allowed_hosts or [])]


@dataclass(frozen=True)
class MachineOptions:
    """Which models write captions when the page asks for it."""

    _argument_group_name: ClassVar[str] = "Captions by machine"

    tagger_model: Path | None = option(
        None, "Offer tags for L by the tagger in this folder, as --model_dir of finetune/tag_images_by_wd14_tagger.py."
    )
    captioner_model: str | None = option(
        None, "Offer sentences for G by this model, as --model_name_or_path of finetune/make_captions.py."
    )
    captioner_prompt: str | None = option(
        None, "What --captioner_model is asked, as --prompt of finetune/make_captions.py."
    )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if self.tagger_model is not None and not self.tagger_model.is_dir():
            yield f"--tagger_model: there is no folder '{self.tagger_model}'."
        if self.captioner_prompt is not None and self.captioner_model is None:
            yield "--captioner_prompt has no effect without --captioner_model."


OPTION_CLASSES: list[type] = [StudioOptions, ServerOptions, MachineOptions, CaptionOptions, BucketOptions, RunsOptions]


def subsets_of(options: StudioOptions, captions: CaptionOptions, buckets: BucketOptions) -> list[Subset]:
    """Return what to open. Raise `UserError` for a data set file, or limits of buckets, that cannot work."""
    if options.dataset_config is not None:
        training_set = TrainingSetOptions(resolution=options.resolution, enable_bucket=options.enable_bucket)
        return read_dataset_config(options.dataset_config, training_set, LoaderOptions(), captions, buckets)
    subset = Subset(
        image_dir=options.image_dirs[0],
        metadata_file=options.in_json,
        rule=buckets.rule(parse_resolution(options.resolution), enabled=options.enable_bucket),
        captions=resolve([vars(captions)]),
        extension_l=caption_extension([vars(captions)], "l"),
        extension_g=caption_extension([vars(captions)], "g"),
    )
    if options.in_json is not None:
        return [subset]
    subsets = [each for folder in options.image_dirs for each in _of_folder(folder, subset, options)]
    if not any(has_images(each.image_dir) for each in subsets):
        raise UserError(
            f"no images in {' or '.join(repr(str(folder)) for folder in options.image_dirs)}.",
            "Name the folder of the images, or look in its subfolders with --recursive.",
        )
    return subsets


def _of_folder(folder: Path, subset: Subset, options: StudioOptions) -> Iterator[Subset]:
    repeated = repeat_folders(folder)
    for each in repeated:
        yield replace(
            subset,
            image_dir=each.path,
            num_repeats=each.num_repeats,
            class_tokens=each.class_tokens,
            key_prefix=f"{each.path.name}/",
        )
    if not options.recursive:
        if not repeated or has_images(folder):
            yield replace(subset, image_dir=folder)
        return
    below = {image.parent for image in list_files(folder, recursive=True).images} - {each.path for each in repeated}
    for path in sorted(below):
        place = path.relative_to(folder).as_posix()
        yield replace(subset, image_dir=path, key_prefix="" if place == "." else f"{place}/")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
