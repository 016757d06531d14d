"""Step 3: sort the pictures into buckets and write the latents of each beside it, as one .npz a picture."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import torch
from tqdm import tqdm

from library.config.errors import UserError, exits_on_user_error
from library.config.kohya_flags import PREPARE_REFUSED, PREPARE_REPLACED
from library.config.options import option, parse_options, positional
from library.data.buckets import BucketOptions, BucketRule, Size, parse_resolution
from library.data.images import find_images, read_size
from library.data.latent_cache import cache_path, file_digest, read_cache, write_cache
from library.data.latent_preparation import Picture, PreparationSettings, encode_pictures
from library.data.metadata import (
    Metadata,
    keys_of_images,
    read_metadata,
    with_train_resolution,
    write_metadata,
)
from library.sdxl.latents import vae_digest
from library.sdxl.model_source import load_vae

DESCRIPTION = "Sort pictures into buckets and write the latents of each beside it (.npz)."
EXIT_SOME_UNUSABLE = 1


@dataclass(frozen=True)
class PrepareOptions:
    """What is prepared, and how."""

    _argument_group_name: ClassVar[str] = "Latents"

    train_data_dir: Path = positional("Folder of the pictures; the latents are written beside them.")
    in_json: Path = positional("Metadata with the captions, as the merge scripts write it.")
    out_json: Path = positional("Metadata to write: the same with the bucket of each picture (train_resolution).")
    model_name_or_path: str = positional("SDXL checkpoint or VAE; only its VAE is read.")
    batch_size: int = option(1, "Pictures that are encoded at once.")
    max_data_loader_n_workers: int | None = option(None, "Threads that read pictures ahead; up to four if not given.")
    max_resolution: str = option("512,512", "Width,height whose area no bucket exceeds; 1024,1024 for SDXL.")
    mixed_precision: str = option("no", "Precision in which the VAE runs.", choices=("no", "fp16", "bf16"))
    full_path: bool = option(False, "The keys of the metadata are paths, not file names without suffix.")
    flip_aug: bool = option(False, "Encode each picture mirrored too, for --flip_aug in training.")
    alpha_mask: bool = option(False, "Keep the transparency of each picture beside its latents.")
    skip_existing: bool = option(False, "Keep latents that were made from this picture, VAE, bucket and flip.")
    recursive: bool = option(False, "Take the pictures of subfolders too.")
    legacy_crop_coords: bool = option(False, "Record the crop as kohya's trainers do, on the wrong axis.")

    @property
    def vae_dtype(self) -> torch.dtype:
        """The precision in which the VAE runs."""
        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.mixed_precision]

    def problems(self) -> Iterator[str]:
        """What cannot work."""
        if self.batch_size < 1:
            yield f"--batch_size is {self.batch_size}; it must be 1 or more."
        if self.max_data_loader_n_workers is not None and self.max_data_loader_n_workers < 0:
            yield f"--max_data_loader_n_workers is {self.max_data_loader_n_workers}; it must be 0 or more."


OPTION_CLASSES = [PrepareOptions, BucketOptions]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the pictures that the command line names; 1 where some could not be used."""
    options, bucket_options = parse_options(
        OPTION_CLASSES, argv, description=DESCRIPTION, replaced=PREPARE_REPLACED, refused=PREPARE_REFUSED
    )
    rule = bucket_options.rule(parse_resolution(options.max_resolution))
    metadata = read_metadata(options.in_json)
    image_of = keys_of_images(
        find_images(options.train_data_dir, recursive=options.recursive), full_path=options.full_path
    )
    known = {key: image for key, image in image_of.items() if key in metadata}
    _report("pictures without metadata are left out", [str(image_of[key]) for key in image_of.keys() - known.keys()])
    _report("entries of the metadata without a picture stay as they are", metadata.keys() - known.keys())
    if not known:
        raise UserError(
            f"no picture of '{options.train_data_dir}' has an entry in '{options.in_json}'.",
            "Check both paths, and that --full_path and --recursive are as they were for the merge scripts.",
        )

    vae = load_vae(options.model_name_or_path, options.vae_dtype)
    vae.to("cuda" if torch.cuda.is_available() else "cpu")
    problems: list[str] = []
    pictures = _assign(known, rule, problems)
    kept = _still_fitting(pictures.values(), options, vae_digest(vae)) if options.skip_existing else set()
    to_encode = [picture for picture in pictures.values() if picture.path not in kept]
    settings = PreparationSettings(
        options.batch_size,
        options.max_data_loader_n_workers,
        options.flip_aug,
        options.alpha_mask,
        options.legacy_crop_coords,
    )
    outcomes = encode_pictures(to_encode, vae, settings)
    done = set(kept)
    for outcome in tqdm(outcomes, "encoding", len(to_encode), unit="picture"):
        path = outcome.picture.path
        if outcome.redone_in_float32:
            tqdm.write(f"'{path}': {options.mixed_precision} gave NaN or Inf; encoded in float32.")
        if outcome.cached is None:
            problems.append(str(outcome.error))
            continue
        write_cache(cache_path(path), outcome.cached)
        done.add(path)

    _write(options.out_json, metadata, pictures, done)
    _print_table([picture for picture in pictures.values() if picture.path in done], num_kept=len(kept))
    _report("pictures could not be used", problems)
    return EXIT_SOME_UNUSABLE if problems else 0


def _assign(known: dict[str, Path], rule: BucketRule, problems: list[str]) -> dict[str, Picture]:
    pictures = {}
    for key, path in known.items():
        try:
            size = read_size(path)
            pictures[key] = Picture(path, size, rule.assign(size))
        except UserError as error:
            problems.append(str(error) if str(path) in str(error) else f"'{path}': {error}")
    return pictures


def _still_fitting(pictures: Iterable[Picture], options: PrepareOptions, digest: str) -> set[Path]:
    """Pictures whose latents are there and say that they were made from just this; other programs' do not say it."""
    fitting = set()
    for picture in tqdm(pictures, "checking latents", unit="picture"):
        path = cache_path(picture.path)
        if not path.is_file():
            continue
        try:
            cached = read_cache(path)
        except UserError as error:
            tqdm.write(f"{error} It is made again.")
            continue
        reasons = cached.reasons_stale(
            image_digest=file_digest(picture.path),
            vae_digest=digest,
            bucket=picture.assignment.bucket,
            flip=options.flip_aug,
        )
        same_crop = (cached.resized_size is None) == options.legacy_crop_coords
        has_mask = cached.alpha_mask is not None or not options.alpha_mask
        if cached.is_ours and same_crop and has_mask and not reasons:
            fitting.add(picture.path)
    return fitting


def _write(path: Path, metadata: Metadata, pictures: dict[str, Picture], done: set[Path]) -> None:
    prepared = {key: picture for key, picture in pictures.items() if picture.path in done}
    entries = {
        key: with_train_resolution(entry, prepared[key].assignment.bucket) if key in prepared else entry
        for key, entry in metadata.items()
    }
    write_metadata(path, entries)
    print(f"wrote {len(entries)} entries, {len(prepared)} of them with latents, to '{path}'")


def _print_table(pictures: Sequence[Picture], num_kept: int) -> None:
    counts: dict[Size, int] = {}
    for picture in pictures:
        bucket = picture.assignment.bucket
        counts[bucket] = counts.get(bucket, 0) + 1
    print("     bucket  pictures")
    for bucket, count in sorted(counts.items()):
        print(f"{bucket!s:>11}  {count:>8}")
    errors = [abs(picture.assignment.aspect_error) for picture in pictures]
    mean_error = sum(errors) / max(1, len(errors))
    print(f"{len(pictures)} pictures ({num_kept} had their latents), mean aspect error {mean_error:.4f}")


def _report(what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        print(f"{len(names)} {what}:", *names, sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
