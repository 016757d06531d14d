"""Step 3: sort the images into buckets and write the latents of each beside it, one .npz per image."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from library.config.environment import torch_environment

os.environ.update(torch_environment())  # read by torch when it is imported

from library.captions.options import CaptionOptions
from library.config.errors import UserError, exits_on_user_error
from library.config.kohya_spellings import PREPARE_SPELLINGS
from library.config.magnitudes import MOST_IMAGES_AT_ONCE, MOST_WORKERS
from library.config.options import option, parse_options, positional
from library.data.dataset_config import read_dataset_config
from library.data.loader_options import LoaderOptions
from library.data.training_set_options import TrainingSetOptions
from library.images.augmentation import RESIZE_INTERPOLATION_HELP, RESIZE_INTERPOLATIONS, interpolation_of
from library.images.buckets import BucketOptions, parse_resolution

DESCRIPTION = "Sort images into buckets and write the latents of each beside it (.npz)."
DATA_SET_DESCRIPTION = (
    "Write the latents of all subsets of a data set file beside their images, in the files in which sdxl_train.py with "
    "the same --dataset_config looks for them."
)
EXIT_SOME_UNUSABLE = 1


@dataclass(frozen=True)
class PrepareOptions:
    """What is prepared."""

    _argument_group_name: ClassVar[str] = "Images"

    train_data_dir: Path = positional("Folder of the images; the latents are written beside them.")
    in_json: Path = positional("Metadata with the captions: JSON of the merge scripts, or JSONL.")
    out_json: Path = positional(
        "Metadata to write: the same with the bucket of each image (train_resolution); JSONL if it ends in .jsonl."
    )
    model_name_or_path: str = positional("SDXL checkpoint or VAE; only its VAE is read.")
    max_resolution: str = option("512,512", "Width,height whose area no bucket exceeds; 1024,1024 for SDXL.")
    full_path: bool = option(False, "The keys of the metadata are paths, not file names without suffix.")
    recursive: bool = option(False, "Include the images of subfolders.")
    remove_missing: bool = option(False, "Leave entries whose image is gone out of out_json.")
    skip_existing: bool = option(
        False, "Keep latents that were made from this image, mask, VAE, bucket, flip and interpolation."
    )
    conditioning_data_dir: Path | None = option(
        None,
        "Folder of masks, one of the same name and size for each image, to keep with the latents for --masked_loss in "
        "training.",
    )

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        masks = self.conditioning_data_dir
        if masks is not None and not masks.is_dir():
            yield f"--conditioning_data_dir: there is no folder '{masks}'; name the folder of the masks."


@dataclass(frozen=True)
class LatentOptions:
    """How images are encoded."""

    _argument_group_name: ClassVar[str] = "Latents"

    batch_size: int = option(1, "Images the VAE encodes at once.", least=1, most=MOST_IMAGES_AT_ONCE)
    max_data_loader_n_workers: int | None = option(
        None, "Threads that load images ahead. Not given: up to four.", least=0, most=MOST_WORKERS
    )
    mixed_precision: str = option("no", "Precision of the VAE.", choices=("no", "fp16", "bf16"))
    flip_aug: bool = option(False, "Also encode each image flipped, for --flip_aug in training.")
    alpha_mask: bool = option(
        False, "Keep the transparency of each image with its latents, for --alpha_mask in training."
    )
    resize_interpolation: str | None = option(None, RESIZE_INTERPOLATION_HELP, choices=RESIZE_INTERPOLATIONS)
    legacy_crop_coords: bool = option(False, "Record the crop as kohya's trainers do, on the wrong axis.")
    latents_as: str = option(
        "npz",
        "Write an .npz beside each image, or shards beside the metadata: files of up to 1024 images of one bucket, for "
        "large sets.",
        choices=("npz", "shards"),
    )
    latents_dtype: str = option(
        "float32",
        "Numbers of the latents in shards. bf16 halves them; training from them differs.",
        choices=("float32", "bf16"),
    )

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if self.latents_dtype != "float32" and self.latents_as != "shards":
            yield "--latents_dtype: .npz files are float32; add --latents_as=shards."

    @property
    def shards_in(self) -> str | None:
        """The name of torch's dtype of the numbers in shards, None if there are none."""
        if self.latents_as == "npz":
            return None
        return {"float32": "float32", "bf16": "bfloat16"}[self.latents_dtype]

    @property
    def of_encoding(self) -> dict[str, Any]:
        """What an `Encoding` is made of, but for the flip."""
        num_threads = self.max_data_loader_n_workers
        return {
            "batch_size": self.batch_size,
            "legacy_crop": self.legacy_crop_coords,
            "num_threads": None if num_threads is None else max(1, num_threads),  # one is the least that reads at all
        }

    @property
    def vae_dtype(self) -> str:
        """The name of torch's dtype in which the VAE works."""
        return {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[self.mixed_precision]


@dataclass(frozen=True)
class DataSetOptions:
    """Which data set file is prepared, and what holds where it says nothing."""

    _argument_group_name: ClassVar[str] = "Data set file"

    model_name_or_path: str = positional("SDXL checkpoint or VAE; only its VAE is read.")
    dataset_config: Path = option(  # it makes a field
        Path(),
        "TOML or JSON file of the data sets, as sdxl_train.py reads it. It replaces the folder and the metadata.",
    )
    resolution: str = option("1024,1024", "Training size, as width,height.", aliases=["--max_resolution"])
    enable_bucket: bool = option(False, "Sort images into buckets. Otherwise crop them to the resolution.")
    cache_info: bool = option(
        False, "Write the sizes of images into their folders (image_sizes.json), for the next start of any script."
    )
    skip_existing: bool = option(
        True, "Keep latents that were made from this image, mask, VAE, bucket, flip and interpolation."
    )

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        try:
            parse_resolution(self.resolution)
        except UserError as error:
            yield f"--resolution: {error}"
        if not self.dataset_config.is_file():
            yield f"--dataset_config: there is no file '{self.dataset_config}'; check the path."


OPTION_CLASSES = [PrepareOptions, LatentOptions, BucketOptions]
DATA_SET_CLASSES = [DataSetOptions, LatentOptions, BucketOptions]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the images that the command line names; return 1 if some could not be used."""
    argv = sys.argv[1:] if argv is None else argv
    if any(argument.partition("=")[0] == "--dataset_config" for argument in argv):
        return prepare_data_set_file(argv)
    options, latents, bucket_options = parse_options(
        OPTION_CLASSES, argv, description=DESCRIPTION, spellings=PREPARE_SPELLINGS
    )
    rule = bucket_options.rule(parse_resolution(options.max_resolution))
    # Only now: a mistake on the command line is answered without the seconds that importing torch takes.
    from library.data.folder_preparation import prepare_folder
    from library.data.latent_preparation import Encoding
    from library.training.run_lock import run_lock

    encoding = Encoding(flip=latents.flip_aug, **latents.of_encoding)
    with run_lock(options.out_json.absolute().parent, options.out_json.name, doing="preparing"):
        num_failed = prepare_folder(
            options.train_data_dir,
            options.in_json,
            options.out_json,
            options.model_name_or_path,
            rule,
            encoding,
            latents.vae_dtype,
            full_path=options.full_path,
            recursive=options.recursive,
            skip_existing=options.skip_existing,
            remove_missing=options.remove_missing,
            resize_interpolation=interpolation_of(latents.resize_interpolation),
            alpha_mask=latents.alpha_mask,
            mask_dir=options.conditioning_data_dir,
            shards_in=latents.shards_in,
        )
    return EXIT_SOME_UNUSABLE if num_failed else 0


def prepare_data_set_file(argv: Sequence[str]) -> int:
    """Prepare the data set file that the command line names; return 1 if some images could not be used."""
    options, latents, bucket_options = parse_options(
        DATA_SET_CLASSES, argv, description=DATA_SET_DESCRIPTION, spellings=PREPARE_SPELLINGS
    )
    if latents.latents_as == "shards":
        raise UserError(
            "--latents_as=shards needs a metadata file, beside which the shards lie.",
            "Prepare folder and metadata without --dataset_config, or leave --latents_as out.",
        )
    training_set = TrainingSetOptions(
        dataset_config=options.dataset_config,
        resolution=options.resolution,
        enable_bucket=options.enable_bucket,
        cache_info=options.cache_info,
        flip_aug=latents.flip_aug,
        masked_loss=True,  # or masks of the file would be refused
        alpha_mask=latents.alpha_mask,
        resize_interpolation=latents.resize_interpolation,
        legacy_crop_coords=latents.legacy_crop_coords,
    )
    subsets = read_dataset_config(
        options.dataset_config, training_set, LoaderOptions(), CaptionOptions(), bucket_options
    )
    from library.data.data_set_preparation import prepare_data_set
    from library.data.latent_preparation import Encoding

    num_failed = prepare_data_set(
        subsets,
        options.model_name_or_path,
        Encoding(**latents.of_encoding),
        latents.vae_dtype,
        skip_existing=options.skip_existing,
    )
    return EXIT_SOME_UNUSABLE if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
