"""Give every script metadata that somebody damaged: each ends with success, or with status 2 and one line of error.

    python benchmarks/fuzz_metadata.py [--seconds 600] [--seed 0]

Each case is one metadata file, JSON or JSONL: that of a small set, with values of other types and of absurd sizes,
other keys, and bytes that are cut off or changed. The merge scripts extend it, the preparation reads it and the trainer
takes one step with it, on the tiny SDXL; the latter two in a process that ends after two minutes. Nothing may be
written outside of the folders that the commands name. The result goes to benchmarks/results/fuzz_metadata.{json,txt}.
Needs POSIX.
"""

import argparse
import contextlib
import copy
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from PIL import Image

import sdxl_train
from benchmarks.ceilings import machine
from benchmarks.fuzz_options import make_folder
from benchmarks.fuzz_outcomes import Outcome, outcome_in_process, outcome_of
from benchmarks.result_files import RESULTS, machine_line, write_result
from finetune import prepare_buckets_latents, sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata

_SECONDS_OF_A_RUN = 120.0
_EXIT_SOME_UNUSABLE = "some images unusable"

SIZES: tuple[object, ...] = (
    *([1, 1], [0, 0], [-64, 64], [64, 64], [128, 64], [72, 88], [66, 65], [10**12, 8], [8, 10**12], [8, 8], [64]),
    *([64, 64, 64], [64.0, 64.0], ["64", "64"], [True, 64], [None, None], [[64], [64]], "64,64", 64, {"w": 64}, []),
    *([10**400, 64], [16384, 16384], [8, 1600], [float("nan"), 64]),
)
VALUES: tuple[object, ...] = (
    *(None, True, False, 0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**30, "", " ", "a", "a\0b", "\ud800"),
    *("猫 🐈", "a, b, c", "{a|b}", "(a:1.3)", "(a:1e400)", "a\nb", "\x1b[2J", "a" * 100_000, "," * 5000, "(" * 5000),
    *([], [""], ["a", "b"], ["a", 1], [["a"]], [None], {}, {"a": "b"}, [[[[[[]]]]]], ["a"] * 1000),
)
KEYS = (
    *("", " ", ".", "..", "/", "\\", "01", "01.png", "02", "images/01.png", "../images/01.png", "../secret.png", "03"),
    *("/etc/passwd", "C:\\images\\01.png", "/old/01.png", "/old/a/02.png", "//01.png", "a/../01", "~", "NUL", "con"),
    *("a\0b", "\ud800", "a" * 300, "a" * 5000, "a/" * 3000 + "01.png", "猫", "\x1b]0;x\x07", "01.npz", "deep/02.png"),
)
NAMES = ("captionL", "captionG", "caption", "tags", "train_resolution", "image_size", "loss_weight", "is_reg", "other")


def make_set(folder: Path) -> None:
    """Make a model, images at two levels, their latents and metadata, and an image beside the folder, in `folder`."""
    make_folder(folder)
    (folder / "images" / "deep").mkdir()
    for name in ("02", "deep/03"):
        Image.new("RGB", (64, 96), "blue").save(folder / "images" / f"{name}.png")
        for suffix in (".txt", ".caption"):
            (folder / "images" / f"{name}{suffix}").write_text("a", encoding="utf-8")
    shutil.copy(folder / "images" / "01.npz", folder / "images" / "04.npz")  # whose image is gone
    Image.new("RGB", (64, 64)).save(folder / "secret.png")
    (folder / "pristine").mkdir()
    (folder / "images").rename(folder / "pristine" / "images")


# -- damage -----------------------------------------------------------------------------------------------------------


def sound_metadata() -> dict[str, Any]:
    """Return what the scripts write for the set."""
    captions = {"captionG": "a cat", "captionL": "photo, soft light"}
    return {
        "01": captions | {"train_resolution": [64, 64]},
        "02": captions | {"train_resolution": [64, 96]},
        "deep/03.png": dict(captions),
        "04": captions | {"train_resolution": [64, 64]},
    }


def damaged(draw: random.Random) -> tuple[str, bytes]:
    """Return the name and the content of one metadata file."""
    metadata = sound_metadata()
    for _ in range(draw.randint(0, 3)):
        draw.choice((_other_value, _other_value, _other_size, _other_key, _other_entry, _without))(metadata, draw)
    if draw.random() < 0.2:
        lines = [{"image_path": key, **entry} for key, entry in metadata.items() if isinstance(entry, dict)]
        return "meta.jsonl", _damaged_text("\n".join(map(json.dumps, lines)), draw)
    return "meta.json", _damaged_text(json.dumps(metadata, indent=draw.choice((None, 2))), draw)


def _entry(metadata: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    entries = [entry for entry in metadata.values() if isinstance(entry, dict)]
    return draw.choice(entries) if entries else {}


def _other_value(metadata: dict[str, Any], draw: random.Random) -> None:
    _entry(metadata, draw)[draw.choice(NAMES)] = copy.deepcopy(draw.choice(VALUES))


def _other_size(metadata: dict[str, Any], draw: random.Random) -> None:
    _entry(metadata, draw)[draw.choice(("train_resolution", "image_size"))] = copy.deepcopy(draw.choice(SIZES))


def _other_key(metadata: dict[str, Any], draw: random.Random) -> None:
    metadata[draw.choice(KEYS)] = metadata.pop(draw.choice(list(metadata))) if metadata else {}


def _other_entry(metadata: dict[str, Any], draw: random.Random) -> None:
    metadata[draw.choice((*KEYS, *metadata))] = copy.deepcopy(draw.choice(VALUES))


def _without(metadata: dict[str, Any], draw: random.Random) -> None:
    entry = _entry(metadata, draw)
    if entry:
        del entry[draw.choice(list(entry))]


def _damaged_text(text: str, draw: random.Random) -> bytes:
    data = bytearray(text.encode("utf-8", errors="surrogatepass"))
    kind = draw.random()
    if kind < 0.1:
        return bytes(data[: draw.randrange(len(data) + 1)])
    if kind < 0.25 and data:
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 3)] = draw.choice((b"", b"\xff", b"\0", b'"', b"{", b"]", b",", b"1e999"))
    if kind > 0.97:
        return bytes(draw.choice((b"", b"[" * 5000, b"\xef\xbb\xbf" + data, data + data, b"null", b"9" * 9000, b"{}")))
    return bytes(data)


# -- outcomes ---------------------------------------------------------------------------------------------------------


def commands(name: str, draw: random.Random) -> dict[str, tuple[Callable[[Sequence[str]], int], list[str]]]:
    """Return what is done with the metadata file `name`, by the name of the script."""
    flags = [flag for flag in ("--recursive", "--full_path", "--remove_missing") if draw.random() < 0.4]
    prepared = f"prepared{Path(name).suffix}"
    train = [
        *("--pretrained_model_name_or_path=model.safetensors", f"--in_json={name}", "--train_data_dir=images"),
        *("--output_dir=output", "--max_data_loader_n_workers=0", "--resolution=64,64", "--max_train_steps=1"),
        *draw.choice(([], ["--cache_latents"], ["--cache_latents_to_disk"], ["--enable_bucket", "--flip_aug"])),
    ]
    return {
        "merge G": (sdxl_merge_captions_g_to_metadata.main, ["images", "merged.json", f"--in_json={name}", *flags]),
        "merge L": (sdxl_merge_captions_l_to_metadata.main, ["images", "merged.json", f"--in_json={name}", *flags]),
        "prepare": (
            prepare_buckets_latents.main,
            ["images", name, prepared, "model.safetensors", "--max_resolution=64,64", "--min_bucket_reso=64", *flags],
        ),
        "train": (sdxl_train.main, train),
    }


def strangers() -> list[str]:
    """Return the files that no command may have made."""
    allowed = ("images", "pristine", "output", "meta", "merged", "prepared", "model.safetensors", "secret.png")
    return [path.name for path in Path().iterdir() if not path.name.startswith(allowed)]


def fuzz(folder: Path, *, seed: int, seconds: float = float("inf"), num_cases: int = sys.maxsize) -> dict[str, Any]:
    """Try cases in `folder` for a time or a number; return the counts and what is wrong with some."""
    make_set(folder)
    started = time.monotonic()
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    findings: list[dict[str, Any]] = []
    num_files = 0
    with contextlib.chdir(folder):
        for _ in itertools.takewhile(lambda _: time.monotonic() - started < seconds, range(num_cases)):
            name, content = damaged(draw)
            num_files += 1
            for script, (main, argv) in commands(name, draw).items():
                _start_again(name, content)
                if script.startswith("merge"):
                    outcome = outcome_of(main, argv)
                else:
                    outcome = outcome_in_process(main, argv, seconds=_SECONDS_OF_A_RUN)
                if script == "prepare" and outcome.name == "message" and outcome.details.startswith("status 1: "):
                    outcome = Outcome(_EXIT_SOME_UNUSABLE)
                if strangers():
                    outcome = Outcome("written elsewhere", ", ".join(strangers()))
                counts[f"{script}: {outcome.name}"] += 1
                if outcome.name not in ("success", "refused", _EXIT_SOME_UNUSABLE):
                    findings.append(
                        {
                            "argv": argv,
                            "content": content.decode("utf-8", errors="backslashreplace")[:2000],
                            "outcome": outcome.name,
                            "details": outcome.details[-3000:],
                        }
                    )
    return {
        "seconds": round(time.monotonic() - started),
        "seed": seed,
        "num_files": num_files,
        "outcomes": dict(sorted(counts.items())),
        "findings": findings,
    }


def _start_again(name: str, content: bytes) -> None:
    for path in _made():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(Path("pristine") / "images", "images")
    Path(name).write_bytes(content)


def _made() -> Iterator[Path]:
    kept = ("pristine", "model.safetensors", "secret.png")
    return (path for path in Path().iterdir() if path.name not in kept)


def table_of(result: dict[str, Any], machine: str) -> str:
    """Return the figures as text."""
    lines = [
        machine,
        "",
        f"{result['num_files']} damaged metadata files, each read by four scripts, {result['seconds']} s, seed "
        f"{result['seed']}",
        f"{len(result['findings'])} commands ended otherwise than by success or by status 2 and one line of error",
        "",
        *(f"{count:7d}  {name}" for name, count in result["outcomes"].items()),
    ]
    return "\n".join([*lines, *("", *map(str, result["findings"]))] if result["findings"] else lines)


def main() -> int:
    """Fuzz for a while and write the result; return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="for how long")
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz_metadata", help="where, without suffix")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(Path(folder) / "set", seed=arguments.seed, seconds=arguments.seconds)
    found_machine = machine()
    write_result(arguments.out, {"machine": found_machine, **result}, table_of(result, machine_line(found_machine)))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
