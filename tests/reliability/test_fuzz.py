"""Whatever stands in a file or on a command line: it is understood, or refused by a `UserError`, and nothing else."""

import io
import json
import struct
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from library.captions.options import CaptionOptions
from library.config.errors import UserError
from library.config.kohya_flags import TRAINER_REFUSED, TRAINER_REPLACED
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.options import options_of, parse_options
from library.data.flag_subsets import subset_of_flags
from library.data.latent_cache import CachedLatents, read_cache, write_cache
from library.data.loader_options import LoaderOptions
from library.data.metadata import read_metadata, write_metadata
from library.data.training_set import find_training_images
from library.data.training_set_options import TrainingSetOptions
from library.images.keys import images_by_stem, resolve_image
from library.images.reading import load_rgb_and_alpha, read_size
from library.samples.prompts import SAMPLERS, read_prompt_file
from library.sdxl.tensor_file import open_tensors
from library.training.run_options import OPTION_CLASSES, TrainingOptions
from tests.training_images import RULE

# The same examples in every run, and nothing kept between runs; the folder of a test may serve all its examples.
fuzzed = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

plain_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
json_values = st.recursive(
    plain_values,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damaged(draw, whole: bytes, within: int | None = None) -> bytes:
    """`whole` with a few bytes changed (among the first `within`), taken out or put in, and perhaps cut short."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(data), within or len(data))))
        data[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=6))
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


# -- metadata ---------------------------------------------------------------------------------------------------------

keys = st.text(max_size=12) | st.sampled_from(["a", "../a", "..\\a.png", "/", ".", "", "a" * 5000, "\0", "\ud800"])
entries = st.dictionaries(
    st.sampled_from(["captionL", "captionG", "train_resolution", "tags"]) | st.text(max_size=5),
    json_values | st.lists(st.integers(), max_size=3),
    max_size=4,
)
metadata_bytes = (
    st.binary(max_size=200)
    | st.dictionaries(keys, entries | json_values, max_size=4).map(lambda content: json.dumps(content).encode())
    | damaged(b'{"01": {"captionG": "a cat", "captionL": "photo", "train_resolution": [1024, 1024]}, "02": {}}')
    | st.integers(1, 5000).map(lambda depth: b'{"a": {"b": ' + b"[" * depth + b"]" * depth + b"}}")
    | st.integers(4000, 9000).map(lambda digits: b'{"a": {"b": ' + b"9" * digits + b"}}")
)


@fuzzed
@given(content=metadata_bytes)
def test_metadata_is_read_and_written_again_or_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "meta.json"
    path.write_bytes(content)
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    with suppress(UserError):
        metadata = read_metadata(path)
        write_metadata(tmp_path / "again.json", metadata)
        assert repr(read_metadata(tmp_path / "again.json")) == repr(metadata)  # NaN does not equal itself
        for key in metadata:
            resolve_image(key, images, images_by_stem(images))
    with suppress(UserError):
        find_training_images(
            [subset_of_flags(TrainingSetOptions(images, path), LoaderOptions(), CaptionOptions(), RULE)]
        )


# -- prompt files -----------------------------------------------------------------------------------------------------

prompt_words = st.sampled_from(["a cat", "--e", "--w", "--s", "--ss", "--d", "--l", "--n", "--", "--x", "#", "\n", "="])
prompt_values = st.sampled_from(["1024", "-1", "1e9", "nan", "9" * 5000, *SAMPLERS]) | st.text(max_size=9)
prompt_lines = st.lists(prompt_words | prompt_values, max_size=9).map(" ".join)
prompt_tables = st.dictionaries(
    st.sampled_from(["prompt", "prompt_l", "width", "seed", "scale", "sampler", "subset"]) | st.text(max_size=9),
    json_values,
    max_size=4,
)
prompt_json = st.lists(prompt_tables | prompt_lines | json_values, max_size=3).map(json.dumps)
ENDLESS_TOML = [
    *("width = 0x" + "F" * 5000, "seed = 1" + "0" * 5000, "learning_rate = 0x" + "F" * 5000),
    *("prompt" + ".a" * 3000 + " = 1", "prompt = " + "[" * 3000, "prompt = " + "[" * 3000 + "]" * 3000),
]
prompt_toml = st.one_of(
    st.text(max_size=60),
    st.tuples(
        st.sampled_from(["[prompt]", "[[prompt]]", "[[prompt.subset]]", ""]),
        st.sampled_from(["scale = inf", "seed = 1979-05-27", "seed = 2001-99-99", *ENDLESS_TOML]),
    ).map('\nprompt_l = "a"\n'.join),
)


@fuzzed
@given(
    suffix_and_text=st.tuples(st.just(".txt"), prompt_lines | st.text(max_size=60))
    | st.tuples(st.just(".json"), prompt_json | st.text(max_size=60) | st.just("[" * 9000))
    | st.tuples(st.just(".toml"), prompt_toml)
)
def test_a_prompt_file_is_read_or_refused(suffix_and_text: tuple[str, str], tmp_path: Path):
    suffix, text = suffix_and_text
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with suppress(UserError):
        assert read_prompt_file(path)


# -- options ----------------------------------------------------------------------------------------------------------

option_names = [each.name for option_class in OPTION_CLASSES for each in options_of(option_class)]
old_names = [flag[2:] for flag in (*TRAINER_REPLACED, *TRAINER_REFUSED)]
names = st.sampled_from(option_names) | st.sampled_from(old_names) | st.text(max_size=9)
values = plain_values.map(str) | st.sampled_from(["", "true", "None", "1e400", "9" * 5000, "a" * 5000, "a\0b", "-1"])
arguments = st.lists(st.tuples(names, values, st.sampled_from(["--{}={}", "--{}", "{1}", "--{} {}"])), max_size=6)
toml_numbers = st.integers(-(2**64), 2**64) | st.floats() | st.sampled_from([10**19, 1e308])
toml_values = st.booleans() | toml_numbers | values | st.lists(values | toml_numbers, max_size=3)


def _without_what_ends_the_script(argument: str) -> bool:
    return argument not in ("-h", "--help") and "output_config" not in argument and "config_file" not in argument


def _parse(argv: list[str]) -> None:
    parse_options(
        OPTION_CLASSES,
        argv,
        description="",
        spellings=TRAINER_SPELLINGS,
        conflicts=lambda *classes: TrainingOptions(*classes).conflicts(),
    )


@fuzzed
@given(written=arguments)
def test_a_command_line_is_understood_or_refused(written: list[tuple[str, str, str]]):
    argv = [form.format(name, value) for name, value, form in written]
    with suppress(UserError):
        _parse([argument for argument in argv if _without_what_ends_the_script(argument)])


@fuzzed
@given(
    content=st.dictionaries(names, toml_values | st.dictionaries(names, toml_values, max_size=3), max_size=4).map(
        lambda tables: tomli_w.dumps(tables).encode("utf-8", errors="replace")
    )
    | st.binary(max_size=60)
    | st.sampled_from(ENDLESS_TOML).map(str.encode)
    | damaged(b"[training]\nlearning_rate = 1e-5\noptimizer_args = ['a=1']\nsdpa = true\n")
)
def test_a_file_of_options_is_understood_or_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "options.toml"
    path.write_bytes(content)
    with suppress(UserError):
        _parse([f"--config_file={path}"])


# -- binary files -----------------------------------------------------------------------------------------------------


def _cache() -> bytes:
    latents = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)
    written = io.BytesIO()
    np.savez(written, latents=latents, original_size=[64, 64], crop_ltrb=[0.0, 0.0, 64.0, 64.0])
    return written.getvalue()


@fuzzed
@given(content=damaged(_cache()) | damaged(_cache(), within=200) | st.binary(max_size=60))
def test_a_cache_file_is_read_or_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with suppress(UserError):
        assert isinstance(read_cache(path), CachedLatents)


numbers = st.floats() | st.integers(-(2**63), 2**63 - 1)


@fuzzed
@given(
    arrays=st.dictionaries(
        st.sampled_from(["latents", "original_size", "crop_ltrb", "latents_flipped", "resized_size", "alpha_mask"]),
        st.lists(numbers, max_size=5).map(np.array) | st.just(np.ones((4, 2, 2))) | st.text(max_size=5).map(np.array),
    )
)
def test_a_cache_of_any_arrays_is_read_or_refused(arrays: dict[str, np.ndarray], tmp_path: Path):
    whole = {"latents": np.zeros((4, 8, 8)), "original_size": [64, 64], "crop_ltrb": [0, 0, 64, 64]}
    np.savez(tmp_path / "a.npz", **{**whole, **arrays})
    with suppress(UserError):
        write_cache(tmp_path / "b.npz", read_cache(tmp_path / "a.npz"))
        assert read_cache(tmp_path / "b.npz").bucket


TENSORS = save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, {"note": "{}"})
[HEADER_BYTES] = struct.unpack("<Q", TENSORS[:8])
DTYPES = ["F32", "F16", "BF16", "F8_E4M3", "F4", "BOOL", "U64", "C64", "X", ""]
tensor_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES) | json_values,
        "shape": st.lists(st.integers(-1, 2**63), max_size=3) | json_values,
        "data_offsets": st.sampled_from([[0, 24], [0, 0], [24, 0], [0, 2**62]]) | json_values,
    }
)


def _with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(24)


@fuzzed
@given(
    content=damaged(TENSORS, within=8 + HEADER_BYTES)
    | st.dictionaries(st.sampled_from(["__metadata__", "a", "b"]), tensor_entries | json_values).map(_with_header)
    | st.binary(max_size=60)
)
def test_a_safetensors_file_is_read_or_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with suppress(UserError), open_tensors(path) as reader:
        for name, shape in reader.shapes.items():
            assert tuple(reader.get(name).shape) == shape


def _picture(suffix: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, suffix, exif=exif)
    return written.getvalue()


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
@pytest.mark.filterwarnings("ignore")  # what Pillow warns of beside is not asked here
def test_a_picture_is_read_or_refused(suffix: str, tmp_path: Path):
    whole = _picture(suffix)

    @fuzzed
    @given(content=damaged(whole) | damaged(whole, within=100))
    def examine(content: bytes) -> None:
        path = tmp_path / f"a.{suffix.lower()}"
        path.write_bytes(content)
        for read in (read_size, load_rgb_and_alpha):
            with suppress(UserError), redirect_stdout(io.StringIO()):
                assert read(path)

    examine()
