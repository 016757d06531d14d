"""Step 3: sort the pictures into buckets and write the latents of each beside it, as one .npz a picture."""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

# Read by torch when it is imported: large tensors in huge pages, or the kernel spends longer handing out the memory of
# 3.5 billion weights than the disk spends reading them.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from tqdm import tqdm

from library.config.atomic_files import remove_leftovers
from library.config.errors import UserError, exits_on_user_error
from library.config.kohya_flags import PREPARE_REFUSED, PREPARE_REPLACED
from library.config.messages import notify
from library.config.options import option, parse_options, positional
from library.data.buckets import BucketedImage, BucketOptions, BucketRule, parse_resolution
from library.data.crops import LEGACY_CROP_NOTICE
from library.data.image_keys import keys_of_images
from library.data.images import UnusableImage, find_images, read_size
from library.data.latent_cache import CacheDemands, cache_path, read_fitting_cache, require_separate_caches, write_cache
from library.data.latent_preparation import Encoding, Outcome, encode_images, require_disk_for_latents
from library.data.metadata import Metadata, read_metadata, with_train_resolution, write_metadata
from library.sdxl.latents import vae_digest
from library.sdxl.model_source import load_vae

DESCRIPTION = "Sort pictures into buckets and write the latents of each beside it (.npz)."
EXIT_SOME_UNUSABLE = 1


@dataclass(frozen=True)
class PrepareOptions:
    """What is prepared."""

    _argument_group_name: ClassVar[str] = "Pictures"

    train_data_dir: Path = positional("Folder of the pictures; the latents are written beside them.")
    in_json: Path = positional("Metadata with the captions, as the merge scripts write it.")
    out_json: Path = positional("Metadata to write: the same with the bucket of each picture (train_resolution).")
    model_name_or_path: str = positional("SDXL checkpoint or VAE; only its VAE is read.")
    max_resolution: str = option("512,512", "Width,height whose area no bucket exceeds; 1024,1024 for SDXL.")
    full_path: bool = option(False, "The keys of the metadata are paths, not file names without suffix.")
    recursive: bool = option(False, "Take the pictures of subfolders too.")
    skip_existing: bool = option(False, "Keep latents that were made from this picture, VAE, bucket and flip.")


@dataclass(frozen=True)
class LatentOptions:
    """How images are encoded."""

    _argument_group_name: ClassVar[str] = "Latents"

    batch_size: int = option(1, "Images the VAE encodes at once.")
    max_data_loader_n_workers: int | None = option(None, "Threads that load images ahead. Not given: up to four.")
    mixed_precision: str = option("no", "Precision of the VAE.", choices=("no", "fp16", "bf16"))
    flip_aug: bool = option(False, "Also encode each image flipped, for --flip_aug in training.")
    alpha_mask: bool = option(False, "Keep the transparency of each image with its latents.")
    legacy_crop_coords: bool = option(False, "Record the crop as kohya's trainers do, on the wrong axis.")

    @property
    def vae_dtype(self) -> torch.dtype:
        """The precision of the VAE."""
        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.mixed_precision]

    @property
    def encoding(self) -> Encoding:
        """What the library is asked for; one thread is the least that reads at all."""
        num_threads = self.max_data_loader_n_workers
        return Encoding(
            self.batch_size,
            flip=self.flip_aug,
            alpha_mask=self.alpha_mask,
            legacy_crop=self.legacy_crop_coords,
            num_threads=None if num_threads is None else max(1, num_threads),
        )

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work."""
        if self.batch_size < 1:
            yield f"--batch_size is {self.batch_size}; it must be 1 or more."
        if self.max_data_loader_n_workers is not None and self.max_data_loader_n_workers < 0:
            yield f"--max_data_loader_n_workers is {self.max_data_loader_n_workers}; it must be 0 or more."


OPTION_CLASSES = [PrepareOptions, LatentOptions, BucketOptions]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the pictures that the command line names; 1 where some could not be used."""
    options, latent_options, bucket_options = parse_options(
        OPTION_CLASSES, argv, description=DESCRIPTION, replaced=PREPARE_REPLACED, refused=PREPARE_REFUSED
    )
    encoding = latent_options.encoding
    rule = bucket_options.rule(parse_resolution(options.max_resolution))
    remove_leftovers(options.train_data_dir, recursive=True)
    remove_leftovers(options.out_json.parent)
    metadata = read_metadata(options.in_json)
    path_of = _pictures_with_metadata(options, metadata)
    if encoding.legacy_crop:
        notify(LEGACY_CROP_NOTICE)
    vae = load_vae(options.model_name_or_path, None)
    digest = vae_digest(vae)  # before it is narrowed to the precision asked for
    # Not diffusers' own `to`, which warns of every change of precision.
    torch.nn.Module.to(vae, "cuda" if torch.cuda.is_available() else "cpu", latent_options.vae_dtype)

    problems: list[str] = []
    pictures = dict(_assign(path_of, rule, problems))
    kept = set(_still_fitting(pictures.values(), encoding, digest)) if options.skip_existing else set()
    to_encode = [picture for picture in pictures.values() if picture not in kept]
    require_disk_for_latents(options.train_data_dir, to_encode, encoding)
    outcomes = encode_images(to_encode, vae, encoding, vae_digest=digest)
    written = set(_write_latents(tqdm(outcomes, "encoding", len(to_encode), unit="picture"), problems))

    prepared = {key: picture for key, picture in pictures.items() if picture in kept | written}
    for key, picture in prepared.items():
        metadata[key] = with_train_resolution(metadata[key], picture.assignment.bucket)
    write_metadata(options.out_json, metadata)
    print(f"wrote {len(metadata)} entries, {len(prepared)} of them with latents, to '{options.out_json}'")
    _print_table(prepared.values(), num_kept=len(kept))
    _print_names("pictures could not be used", problems)
    return EXIT_SOME_UNUSABLE if problems else 0


def _pictures_with_metadata(options: PrepareOptions, metadata: Metadata) -> dict[str, Path]:
    """The pictures to prepare by their keys; prints what has no counterpart on the other side."""
    images = find_images(options.train_data_dir, recursive=options.recursive)
    path_of = keys_of_images(images, full_path=options.full_path)
    known = {key: path for key, path in path_of.items() if key in metadata}
    _print_names("pictures without metadata are left out", [str(path_of[key]) for key in path_of.keys() - known.keys()])
    _print_names("entries of the metadata without a picture stay as they are", metadata.keys() - known.keys())
    if not known:
        raise UserError(
            f"no picture of '{options.train_data_dir}' has an entry in '{options.in_json}'.",
            "Check both paths, and that --full_path and --recursive are as they were for the merge scripts.",
        )
    require_separate_caches(known.values())
    return known


def _assign(path_of: dict[str, Path], rule: BucketRule, problems: list[str]) -> Iterator[tuple[str, BucketedImage]]:
    for key, path in path_of.items():
        try:
            size = read_size(path)
            yield key, BucketedImage(path, size, rule.assign(size))
        except UnusableImage as error:
            problems.append(str(error))
        except UserError as error:
            problems.append(f"'{path}': {error}")


def _still_fitting(pictures: Iterable[BucketedImage], encoding: Encoding, digest: str) -> Iterator[BucketedImage]:
    demands = CacheDemands(
        vae_digest=digest,
        flip=encoding.flip,
        alpha_mask=encoding.alpha_mask,
        legacy_crop=encoding.legacy_crop,
        only_ours=True,
    )
    for picture in tqdm(pictures, "checking latents", unit="picture"):
        path = cache_path(picture.path)
        if not path.is_file():
            continue
        try:
            read_fitting_cache(path, picture.path, picture.assignment.bucket, demands)
            yield picture
        except UserError as error:
            notify(f"{error.problem} It is encoded again.")


def _write_latents(outcomes: Iterable[Outcome], problems: list[str]) -> Iterator[BucketedImage]:
    for outcome in outcomes:
        if outcome.cached is None:
            problems.append(str(outcome.error))
            continue
        write_cache(cache_path(outcome.image.path), outcome.cached)
        yield outcome.image
        if outcome.redone_in_float32:
            notify(f"'{outcome.image.path}' gave NaN or Inf in the VAE's precision and was encoded in float32.")


def _print_table(pictures: Iterable[BucketedImage], num_kept: int) -> None:
    assignments = [picture.assignment for picture in pictures]
    print("     bucket  pictures")
    for bucket, count in sorted(Counter(assignment.bucket for assignment in assignments).items()):
        print(f"{bucket!s:>11}  {count:>8}")
    mean_error = sum(abs(assignment.aspect_error) for assignment in assignments) / max(1, len(assignments))
    print(f"{len(assignments)} pictures ({num_kept} had their latents), mean aspect error {mean_error:.4f}")


def _print_names(what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        print(f"{len(names)} {what}:", *names, sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
