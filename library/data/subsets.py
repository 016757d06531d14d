"""What the user asks to train on, and in which batches: the flags describe one subset."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar

from library.config.errors import UserError
from library.config.magnitudes import MOST_BATCHES, MOST_IMAGES_AT_ONCE
from library.config.options import option
from library.data.augmentation import (
    RESIZE_INTERPOLATION_HELP,
    RESIZE_INTERPOLATIONS,
    Augmentation,
    interpolation_of,
    parse_face_range,
)
from library.data.buckets import BucketRule, parse_resolution
from library.data.caption_draws import Encoder
from library.data.caption_options import CAPTION_EXTENSIONS, CaptionOptions, caption_extension, resolve
from library.data.caption_rules import PairRules, described_rules
from library.data.loader_options import LoaderOptions
from library.data.repeat_folders import RepeatFolder, repeat_folders

_OR_FOLDERS = ", or sort the images into folders of --train_data_dir named as 10_name"
SUBSET_MARK = "subset "
"""How the names of settings of one subset of several begin, where runs are compared."""


@dataclass(frozen=True)
class TrainingSetOptions:
    """The images to train on, and what is cached of them."""

    _argument_group_name: ClassVar[str] = "Training set"

    train_data_dir: Path | None = option(
        None,
        "Folder of the images and their latents (.npz). Without --in_json, a folder of folders named as 10_name: "
        "repeats, and the caption of images without caption files.",
    )
    in_json: Path | None = option(
        None, "Metadata file (JSON or JSONL) with the captions and, from prepare_buckets_latents.py, the buckets."
    )
    resolution: str = option("1024,1024", "Training size of images without prepared latents, as width,height.")
    enable_bucket: bool = option(
        False, "Sort images without prepared latents into buckets. Otherwise crop them to --resolution."
    )
    dataset_repeats: int = option(1, "Repeats of each image per epoch.", least=1, most=MOST_BATCHES)
    reg_data_dir: Path | None = option(
        None, "Folder of folders named as 1_name, regularization images: repeated until they are as many as the others."
    )
    dataset_config: Path | None = option(
        None,
        "Read folders of images, and how each is trained, from this TOML or JSON file in place of --train_data_dir and "
        "--in_json. Other flags are the defaults of what it leaves out.",
    )
    prior_loss_weight: float = option(
        1.0, "Multiply the loss of regularization images, of --reg_data_dir or marked by is_reg, by this.", least=0
    )
    flip_aug: bool = option(False, "Flip each image horizontally with probability 0.5.")
    color_aug: bool = option(
        False, "Change hue or gamma of each image a little at random. Its latents cannot be cached."
    )
    random_crop: bool = option(
        False, "Crop each image at a random position, not at its centre. Its latents cannot be cached."
    )
    face_crop_aug_range: str | None = option(
        None,
        "Crop around the face that an image is named for (name_x_y_width_height.jpg; x, y: its centre, in pixels), at "
        "random between least and most times as large as the face: 2.0,4.0. Its latents cannot be cached.",
    )
    resize_interpolation: str | None = option(None, RESIZE_INTERPOLATION_HELP, choices=RESIZE_INTERPOLATIONS)
    cache_latents: bool = option(
        False, "Encode images without prepared latents before training, and keep the latents in memory."
    )
    cache_latents_to_disk: bool = option(False, "As --cache_latents, but write the latents beside the images (.npz).")
    vae_batch_size: int = option(
        1, "Images the VAE encodes at once before training.", least=1, most=MOST_IMAGES_AT_ONCE
    )
    one_caption: bool = option(
        False,
        "Train both encoders with the same caption: 'caption' of the metadata followed by 'tags'. Otherwise L reads "
        "'captionL' or else 'tags', G reads 'captionG' or else 'caption'.",
    )
    update_captions: bool = option(
        False,
        "Before training, write caption files that have changed since they were merged into --in_json, and add images "
        "with new caption files to it. With --resume, other images and captions than those of the state are accepted.",
    )
    cache_text_encoder_outputs: bool = option(
        False,
        "Encode each distinct text of the captions once before training, and keep the outputs in memory: of each "
        "text encoder that is frozen and whose texts can be listed.",
    )
    cache_text_encoder_outputs_l: bool = option(
        False, "As --cache_text_encoder_outputs, for encoder L. Refused where its outputs cannot be cached."
    )
    cache_text_encoder_outputs_g: bool = option(
        False, "As --cache_text_encoder_outputs, for encoder G. Refused where its outputs cannot be cached."
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        False,
        "As --cache_text_encoder_outputs, but write the outputs to the folder text_encoder_outputs in "
        "--train_data_dir, or beside --dataset_config. With a form for one encoder, write the outputs of that one.",
    )
    skip_cache_check: bool = option(False, "Trust each .npz without reading its image to see whether it still fits.")
    legacy_crop_coords: bool = option(
        False, "Use the crop coordinates of kohya's trainers (wrong axis), to continue a model trained with them."
    )

    @property
    def caches_latents(self) -> bool:
        """Whether images are encoded before training."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def demanded_text_caches(self) -> tuple[Encoder, ...]:
        """The encoders whose outputs must be cached, or the run is refused."""
        demanded: dict[Encoder, bool] = {"l": self.cache_text_encoder_outputs_l, "g": self.cache_text_encoder_outputs_g}
        return tuple(encoder for encoder, is_demanded in demanded.items() if is_demanded)

    @property
    def augmentation(self) -> Augmentation:
        """What the flags let vary in an image. Raise `UserError` for a range of faces that is none."""
        face_range = self.face_crop_aug_range
        return Augmentation(
            flip_aug=self.flip_aug,
            color_aug=self.color_aug,
            random_crop=self.random_crop,
            face_crop_aug_range=None if face_range is None else parse_face_range(face_range),
            resize_interpolation=interpolation_of(self.resize_interpolation),
        )

    @property
    def caches_texts(self) -> bool:
        """Whether the captions of both encoders are encoded before training, as far as that is possible."""
        only_demanded = bool(self.demanded_text_caches)
        return self.cache_text_encoder_outputs or (self.cache_text_encoder_outputs_to_disk and not only_demanded)

    @property
    def folder(self) -> Path:
        """The folder for what is written beside the whole set."""
        folder = self.train_data_dir if self.dataset_config is None else self.dataset_config.parent
        assert folder is not None  # checked by problems()
        return folder

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        yield from self._source_problems() if self.dataset_config is None else self._dataset_config_problems()
        if self.update_captions and self.one_caption:
            yield (
                "--update_captions reads a caption file for each encoder, --one_caption a caption that both share: "
                "leave one of them off."
            )
        try:
            parse_resolution(self.resolution)
        except UserError as error:
            yield f"--resolution: {error}"
        yield from self._augmentation_problems()

    def _dataset_config_problems(self) -> Iterator[str]:
        assert self.dataset_config is not None
        if not self.dataset_config.is_file():
            yield f"--dataset_config: there is no file '{self.dataset_config}'; check the path."
        for name in ("train_data_dir", "in_json", "reg_data_dir"):
            if getattr(self, name) is not None:
                yield f"--{name} and --dataset_config exclude each other: the file names all folders. Keep one of them."
        if self.update_captions:
            yield "--update_captions needs --in_json: --dataset_config reads captions at each start; leave it off."

    def _source_problems(self) -> Iterator[str]:
        if self.prior_loss_weight != 1 and self.reg_data_dir is None:
            yield "--prior_loss_weight needs --reg_data_dir, or --dataset_config, whose key is_reg marks such images."
        if self.train_data_dir is None:
            yield "--train_data_dir is missing: name the folder of the images."
        elif not self.train_data_dir.is_dir():
            yield f"--train_data_dir: there is no folder '{self.train_data_dir}'; name the folder of the images."
        if self.in_json is None:
            yield from self._folder_problems()
        elif self.reg_data_dir is not None:
            yield "--reg_data_dir cannot be used with --in_json; leave out one of them, or use --dataset_config."
        elif not self.in_json.is_file():
            yield f"--in_json: there is no file '{self.in_json}'; make it with the scripts of finetune/."

    def _folder_problems(self) -> Iterator[str]:
        if self.train_data_dir is None or not repeat_folders(self.train_data_dir):
            yield f"--in_json is missing: name the metadata file, made with the scripts of finetune/{_OR_FOLDERS}."
        if self.reg_data_dir is not None and not repeat_folders(self.reg_data_dir):
            yield f"--reg_data_dir: there is no folder named as 1_name in '{self.reg_data_dir}'."
        if self.update_captions:
            yield "--update_captions needs --in_json; captions beside the images are read at each start. Leave it off."

    def _augmentation_problems(self) -> Iterator[str]:
        try:
            augmentation = self.augmentation
        except UserError as error:
            yield f"--face_crop_aug_range: {error}"
            return
        flags = [f"--{flag}" for flag in ("color_aug", "random_crop", "face_crop_aug_range") if getattr(self, flag)]
        if self.caches_latents and augmentation.changes_pixels:
            cached = "--cache_latents" if self.cache_latents else "--cache_latents_to_disk"
            yield (
                f"{cached} cannot work with {' and '.join(flags)}: the pixels differ at every visit, and with them the "
                f"latents. Leave out {cached}, or {' and '.join(flags)}."
            )
        if self.legacy_crop_coords and augmentation.moves_crop:
            yield (
                "--legacy_crop_coords cannot work with --random_crop or --face_crop_aug_range: its coordinates do not "
                "tell where the crop lies. Leave out one of them."
            )


@dataclass(frozen=True)
class Subset:
    """Images of one folder that are treated alike.

    `dataset` numbers the data set that the subset belongs to: images of different data sets share no batch, those of
    one have its `batch_size`, and the buckets of its `rule`. Without a `metadata_file` the captions are read from the
    files beside the images, which end in `extension_l` and `extension_g`; with `one_caption` both encoders read one.
    `class_tokens` is the caption of an image without a file. The loss of each sample is multiplied by `loss_weight`;
    an image with `is_reg` is a regularization image. With `names_bucket` a cache is named with its bucket.
    A subset that `is_of_file` is described by a data set file or the name of its folder, not by flags alone.
    """

    image_dir: Path
    metadata_file: Path | None
    rule: BucketRule
    dataset: int = 0
    batch_size: int = 1
    num_repeats: int = 1
    captions: PairRules = field(default_factory=PairRules)
    extension_l: str = CAPTION_EXTENSIONS["l"]
    extension_g: str = CAPTION_EXTENSIONS["g"]
    one_caption: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    loss_weight: float = 1.0
    is_reg: bool = False
    class_tokens: str | None = None
    names_bucket: bool = False
    is_of_file: bool = False


def subsets_of_flags(
    training_set: TrainingSetOptions, loader: LoaderOptions, captions: CaptionOptions, rule: BucketRule
) -> list[Subset]:
    """Return what the command line describes: one subset, or without metadata one for each folder named as 10_name."""
    subset = subset_of_flags(training_set, loader, captions, rule)
    if training_set.in_json is not None:
        return [subset]
    assert training_set.train_data_dir is not None  # checked by problems()
    images = [_of_repeat_folder(subset, each) for each in repeat_folders(training_set.train_data_dir)]
    regular = replace(subset, is_reg=True, loss_weight=training_set.prior_loss_weight)
    folders = [] if training_set.reg_data_dir is None else repeat_folders(training_set.reg_data_dir)
    return images + [_of_repeat_folder(regular, each) for each in folders]


def _of_repeat_folder(subset: Subset, folder: RepeatFolder) -> Subset:
    return replace(
        subset,
        image_dir=folder.path,
        num_repeats=folder.num_repeats * subset.num_repeats,
        class_tokens=folder.class_tokens,
        is_of_file=True,
    )


def subset_of_flags(
    training_set: TrainingSetOptions, loader: LoaderOptions, captions: CaptionOptions, rule: BucketRule
) -> Subset:
    """Return the one subset that the command line describes. Raise `UserError` for unreadable protected tags."""
    assert training_set.train_data_dir is not None  # checked by problems()
    return Subset(
        image_dir=training_set.train_data_dir,
        metadata_file=training_set.in_json,
        rule=rule,
        one_caption=training_set.one_caption,
        batch_size=loader.train_batch_size,
        num_repeats=training_set.dataset_repeats,
        captions=resolve([vars(captions)]),
        extension_l=caption_extension([vars(captions)], "l"),
        extension_g=caption_extension([vars(captions)], "g"),
        augmentation=training_set.augmentation,
    )


def described_subsets(subsets: Sequence[Subset]) -> dict[str, str]:
    """Return every setting of the subsets as text, by a name: what runs are compared by.

    A subset of flags is described by the rules of its captions, since the options describe the rest.
    """
    if len(subsets) == 1 and not subsets[0].is_of_file:
        return described_rules(subsets[0].captions)
    described: dict[str, str] = {}
    for number, subset in enumerate(subsets):
        settings = {each.name: str(getattr(subset, each.name)) for each in fields(subset) if each.name != "captions"}
        settings |= described_rules(subset.captions)
        described |= {f"{SUBSET_MARK}{number} {name}": value for name, value in settings.items()}
    return described
