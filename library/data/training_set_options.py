"""The flags of the training set: where its images are, how they vary, and what is cached of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.captions.draws import Encoder
from library.config.errors import UserError
from library.config.magnitudes import HEAVIEST, MOST_BATCHES, MOST_IMAGES_AT_ONCE
from library.config.options import option
from library.data.repeat_folders import repeat_folders
from library.images.augmentation import (
    RESIZE_INTERPOLATION_HELP,
    RESIZE_INTERPOLATIONS,
    Augmentation,
    interpolation_of,
    parse_face_range,
)
from library.images.buckets import parse_resolution

ONE_CAPTION_FILE = (
    "beside the images L reads .txt and G .caption files. Both encoders read one file with --caption_extension=.txt; "
    "leave --one_caption off."
)
"""Why folders of images cannot have --one_caption, and what they can have."""
_OR_FOLDERS = ", or sort the images into folders of --train_data_dir named as 10_name"


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
    dataset_class: str | None = option(
        None,
        "Take images and captions from this Python class, package.module.Class, in place of --in_json: called with "
        "--train_data_dir, it yields what a line of JSONL metadata holds.",
    )
    dataset_config: Path | None = option(
        None,
        "Read folders of images, and how each is trained, from this TOML or JSON file in place of --train_data_dir and "
        "--in_json. Other flags are the defaults of what it leaves out.",
    )
    prior_loss_weight: float = option(
        1.0,
        "Multiply the loss of regularization images, of --reg_data_dir or marked by is_reg, by this.",
        least=0,
        most=HEAVIEST,
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
    masked_loss: bool = option(
        False,
        "Weigh the loss of each part of an image by its mask: black parts are not trained, white ones count in full. "
        "The masks are those of --conditioning_data_dir, or the transparency of the images with --alpha_mask.",
    )
    alpha_mask: bool = option(
        False,
        "Weigh the loss of each part of an image by its opacity: transparent parts are not trained. Implies "
        "--masked_loss. Images with a file in --conditioning_data_dir have that as their mask.",
    )
    conditioning_data_dir: Path | None = option(
        None,
        "Folder of the masks for --masked_loss: for each image one of the same name and size. The first channel "
        "counts.",
    )
    cache_info: bool = option(
        False,
        "Write the sizes of images into their folders (image_sizes.json), so that the next start opens only new and "
        "changed images to read their size.",
    )
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
    check_latents: bool = option(
        False,
        "Read all latents, and the images beside them, to see whether they still fit. Otherwise only those whose files "
        "have another size or time than when they were read last.",
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
        if self.check_latents and self.skip_cache_check:
            yield "--check_latents and --skip_cache_check exclude each other: leave one of them out."
        yield from self._augmentation_problems()

    def _dataset_config_problems(self) -> Iterator[str]:
        assert self.dataset_config is not None
        if not self.dataset_config.is_file():
            yield f"--dataset_config: there is no file '{self.dataset_config}'; check the path."
        for name in ("train_data_dir", "in_json", "reg_data_dir", "dataset_class", "conditioning_data_dir"):
            if getattr(self, name) is not None:
                yield f"--{name} and --dataset_config exclude each other: the file names all folders. Keep one of them."
        if self.update_captions:
            yield "--update_captions needs --in_json: --dataset_config reads captions at each start; leave it off."

    def _source_problems(self) -> Iterator[str]:
        masks = self.conditioning_data_dir
        if masks is not None and not masks.is_dir():
            yield f"--conditioning_data_dir: there is no folder '{masks}'; name the folder of the masks."
        if masks is not None and not self.masked_loss:
            yield "--conditioning_data_dir has no effect without --masked_loss; add it."
        if self.masked_loss and masks is None and not self.alpha_mask:
            yield (
                "--masked_loss has no masks: name their folder with --conditioning_data_dir, or use the transparency "
                "of the images with --alpha_mask."
            )
        if self.prior_loss_weight != 1 and self.reg_data_dir is None and not (self.in_json or self.dataset_class):
            yield (
                "--prior_loss_weight needs regularization images: --reg_data_dir, or metadata or --dataset_config "
                "that marks them by is_reg."
            )
        if self.train_data_dir is None:
            yield "--train_data_dir is missing: name the folder of the images."
        elif not self.train_data_dir.is_dir():
            yield f"--train_data_dir: there is no folder '{self.train_data_dir}'; name the folder of the images."
        if self.in_json is not None and self.dataset_class is not None:
            yield "--in_json and --dataset_class exclude each other: both name the images. Keep one of them."
        if self.in_json is None and self.dataset_class is None:
            yield from self._folder_problems()
        elif self.reg_data_dir is not None:
            flag = "--dataset_class" if self.in_json is None else "--in_json"
            yield f"--reg_data_dir cannot be used with {flag}, where is_reg marks such images; leave out one of them."
        if self.in_json is None:
            if self.update_captions and self.dataset_class is not None:
                yield "--update_captions needs --in_json: --dataset_class is asked at each start. Leave it off."
        elif not self.in_json.is_file():
            yield f"--in_json: there is no file '{self.in_json}'; make it with the scripts of finetune/."

    def _folder_problems(self) -> Iterator[str]:
        if self.train_data_dir is None or not repeat_folders(self.train_data_dir):
            yield f"--in_json is missing: name the metadata file, made with the scripts of finetune/{_OR_FOLDERS}."
        if self.reg_data_dir is not None and not repeat_folders(self.reg_data_dir):
            yield f"--reg_data_dir: there is no folder named as 1_name in '{self.reg_data_dir}'."
        if self.update_captions:
            yield "--update_captions needs --in_json; captions beside the images are read at each start. Leave it off."
        if self.one_caption:
            yield f"--one_caption needs metadata (--in_json): {ONE_CAPTION_FILE}"

    def _augmentation_problems(self) -> Iterator[str]:
        try:
            augmentation = self.augmentation
        except UserError as error:
            yield f"--face_crop_aug_range: {error}"
            return
        if self.dataset_config is None:  # whose subsets say how their images vary
            yield from self.cache_problems([augmentation])
            yield from self.crop_problems(augmentation)

    def cache_problems(self, augmentations: Sequence[Augmentation]) -> Iterator[str]:
        """Yield a sentence if latents are to be cached and those of no image can be."""
        if not (self.caches_latents and all(each.changes_pixels for each in augmentations)):
            return
        cached = "--cache_latents" if self.cache_latents else "--cache_latents_to_disk"
        names = " and ".join(dict.fromkeys(f"--{name}" for each in augmentations for name in each.of_pixels))
        yield (
            f"{cached} cannot work with {names}: the pixels differ at every visit, and with them the latents. Leave "
            f"out {cached}, or {names}."
        )

    def crop_problems(self, augmentation: Augmentation) -> Iterator[str]:
        """Yield a sentence if coordinates are asked for that cannot tell where the crop of an image lies."""
        if self.legacy_crop_coords and augmentation.moves_crop:
            yield (
                "--legacy_crop_coords cannot work with --random_crop or --face_crop_aug_range: its coordinates do not "
                "tell where the crop lies. Leave out one of them."
            )
