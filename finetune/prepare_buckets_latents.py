"""Step 3: sort the images into buckets and write the latents of each beside it, one .npz per image."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

# Read by torch when it is imported: large tensors in huge pages, or the kernel spends longer handing out the memory of
# 3.5 billion weights than the disk spends reading them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from library.config.errors import exits_on_user_error
from library.config.kohya_spellings import PREPARE_SPELLINGS
from library.config.magnitudes import MOST_IMAGES_AT_ONCE, MOST_WORKERS
from library.config.options import option, parse_options, positional
from library.data.augmentation import RESIZE_INTERPOLATION_HELP, RESIZE_INTERPOLATIONS, interpolation_of
from library.data.buckets import BucketOptions, parse_resolution

DESCRIPTION = "Sort images into buckets and write the latents of each beside it (.npz)."
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
        False, "Keep latents that were made from this image, VAE, bucket, flip and interpolation."
    )


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
    alpha_mask: bool = option(False, "Keep the transparency of each image with its latents.")
    resize_interpolation: str | None = option(None, RESIZE_INTERPOLATION_HELP, choices=RESIZE_INTERPOLATIONS)
    legacy_crop_coords: bool = option(False, "Record the crop as kohya's trainers do, on the wrong axis.")


OPTION_CLASSES = [PrepareOptions, LatentOptions, BucketOptions]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the images that the command line names; return 1 if some could not be used."""
    options, latents, bucket_options = parse_options(
        OPTION_CLASSES, argv, description=DESCRIPTION, spellings=PREPARE_SPELLINGS
    )
    rule = bucket_options.rule(parse_resolution(options.max_resolution))
    # Only now: a mistake on the command line is answered without the seconds that importing torch takes.
    from library.data.folder_preparation import prepare_folder
    from library.data.latent_preparation import Encoding

    num_threads = latents.max_data_loader_n_workers
    encoding = Encoding(
        latents.batch_size,
        flip=latents.flip_aug,
        alpha_mask=latents.alpha_mask,
        legacy_crop=latents.legacy_crop_coords,
        num_threads=None if num_threads is None else max(1, num_threads),  # one is the least that reads at all
    )
    num_failed = prepare_folder(
        options.train_data_dir,
        options.in_json,
        options.out_json,
        options.model_name_or_path,
        rule,
        encoding,
        {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[latents.mixed_precision],
        full_path=options.full_path,
        recursive=options.recursive,
        skip_existing=options.skip_existing,
        remove_missing=options.remove_missing,
        resize_interpolation=interpolation_of(latents.resize_interpolation),
    )
    return EXIT_SOME_UNUSABLE if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
