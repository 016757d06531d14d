"""sdxl_gen_img.py on the tiny SDXL: the same images as the trainer's samples, batches, seeds, grids, questions."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdxl_gen_img
from library.config.errors import UserError
from library.samples.generation import Defaults, Folder, records_of
from library.samples.prompts import parse_prompt_line, read_prompt_file
from library.samples.sample_grid import make_sample_grid
from library.samples.sampler import draw_picture
from tests.conftest import Run, forget_accelerator

PROMPTS = """a cat on a mat --e photograph --n blurry --nl low quality --d 7 --s 2 --w 64 --h 96 --l 5
a dog --e anime --d 8 --s 2 --w 64 --h 64 --ss euler_a
"""


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompt.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def draw(tmp_path: Path, model: Path, *flags: str) -> list[Path]:
    """Draw into a new folder and return the images in the order in which they were drawn."""
    forget_accelerator()
    folder = tmp_path / f"drawn {len(list(tmp_path.iterdir()))}"
    assert sdxl_gen_img.main([f"--ckpt={model}", f"--outdir={folder}", *flags]) == 0
    return sorted(folder.iterdir())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def samples(run: Run, pattern: str) -> list[Path]:
    return sorted((run.output / "sample").glob(pattern), key=lambda path: path.name.split("_", 2)[2])


PRECISIONS = [
    pytest.param(["--train_text_encoder"], [], id="float32, text encoders trained"),
    pytest.param(
        ["--mixed_precision=bf16", "--train_text_encoder", "--learning_rate_te2=0"],
        ["--mixed_precision=bf16"],
        id="bf16, L trained",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["--mixed_precision=bf16", "--full_bf16", "--no_half_vae"],
        ["--mixed_precision=bf16", "--no_half_vae"],
        id="full bf16",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("training", "drawing"), PRECISIONS)
def test_images_are_the_samples_of_the_run_bit_for_bit(training, drawing, train, prompt_file, tmp_path: Path):
    run = train(*training, f"--sample_prompts={prompt_file}", "--sample_every_n_steps=1", "--max_train_steps=1")
    model = run.output / "m.safetensors"
    drawn = draw(tmp_path, model, f"--prompt_file={prompt_file}", *drawing)
    sampled = samples(run, "m_*_000001_0*.png")
    assert len(drawn) == len(sampled) == 2
    for ours, theirs in zip(drawn, sampled, strict=True):
        assert np.array_equal(pixels(ours), pixels(theirs))
        with Image.open(ours) as image, Image.open(theirs) as sample:
            said = dict(sample.info)
            assert said.pop("training_step") == "1"
            said["parameters"] = said["parameters"].replace(", Training step: 1", "")
            assert image.info == said


def test_a_grid_has_the_images_of_its_prompts(tiny_networks, tiny_sdxl: Path, tmp_path: Path):
    lines = tmp_path / "prompt.txt"
    lines.write_text("a cat --e photo --s 1 --d 3 --w 64 --h 64\na dog --e anime\n", encoding="utf-8")
    [path] = draw(tmp_path, tiny_sdxl, f"--prompt_file={lines}", "--sample_grid", "--seed=9")
    grid = make_sample_grid(read_prompt_file(lines))
    cells = [
        draw_picture(tiny_networks, prompt, sampler="ddim", width=64, height=64, seed=3, min_chunks=grid.num_chunks)
        for prompt in grid.prompts()
    ]
    assert path.name.endswith("_3.png")
    assert np.array_equal(pixels(path), np.asarray(grid.table(cells)))


def test_a_batch_draws_what_each_image_alone_is(tiny_sdxl: Path, tmp_path: Path):
    # Products of batches sum in another order: the last bits of float32, a grey level at most.
    lines = tmp_path / "prompt.txt"
    lines.write_text("a cat --e photo --s 1\na dog --e anime --s 1\na fox --s 2\n", encoding="utf-8")
    flags = (f"--prompt_file={lines}", "--W=64", "--H=72", "--seed=5", "--images_per_prompt=2")
    alone = draw(tmp_path, tiny_sdxl, *flags)
    together = draw(tmp_path, tiny_sdxl, *flags, "--batch_size=3")
    assert [path.name[18:] for path in alone] == [path.name[18:] for path in together]
    assert [path.name.split("_")[-1] for path in alone] == ["5.png", "6.png"] * 3
    for one, other in zip(alone, together, strict=True):
        difference = np.abs(pixels(one).astype(int) - pixels(other))
        assert difference.max() <= 1
        with Image.open(one) as image:
            assert image.size == (64, 72)


def test_settings_of_the_command_line_hold_for_lines_that_name_none(tiny_sdxl: Path, tmp_path: Path):
    flags = ("--W=64", "--H=64", "--steps=2", "--scale=3.5", "--sampler=euler")
    [image] = draw(tmp_path, tiny_sdxl, "--prompt=a cat --e photo --s 1", *flags)
    with Image.open(image) as opened:
        text = opened.info["parameters"]
    assert "Steps: 1, Sampler: Euler," in text
    assert "CFG scale: 3.5" in text
    assert f"Model: {tiny_sdxl.stem}" in text
    assert re.search(r"Seed: \d+", text)


def test_it_asks_for_prompts_until_there_is_none(tiny_sdxl: Path, tmp_path: Path, monkeypatch, capsys):
    answers = "a cat --d 1\nanime\na dog --x 3\n\na dog --d 2\n\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(answers))
    images = draw(tmp_path, tiny_sdxl, "--W=64", "--H=64", "--steps=1")
    texts = []
    for path in images:
        with Image.open(path) as image:
            texts.append((image.info["prompt_g"], image.info["prompt_l"], image.info["seed"]))
    assert texts == [("a cat", "anime", "1"), ("a dog", "a dog", "2")]
    assert "there is no option --x" in capsys.readouterr().out


def test_a_prompt_that_is_no_utf8_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="what was entered is not UTF-8"):
        sdxl_gen_img._answer("G: ")


def test_a_file_that_stands_there_is_never_replaced(tmp_path: Path):
    [record] = records_of([parse_prompt_line("a cat --d 1", "here")], Defaults(8, 8, "ddim", None, "m"), 1, iter([]))
    image = Image.new("RGB", (8, 8))
    folder = Folder(tmp_path)
    first = folder.save(image, record)
    first.rename(tmp_path / first.name.replace("_000_", "_001_"))
    assert folder.save(image, record).name == first.name.replace("_000_", "_002_")


def test_an_image_without_memory_is_named_and_the_next_one_drawn(tiny_sdxl: Path, tmp_path: Path, monkeypatch, capsys):
    lines = tmp_path / "prompt.txt"
    lines.write_text("a cat --s 1 --w 96\na dog --s 1\n", encoding="utf-8")
    convolve = torch.nn.functional.conv2d

    def need_more_than_there_is(inputs, *arguments, **named):
        if inputs.shape[-1] == 96 // 8:
            torch.empty(2**55)
        return convolve(inputs, *arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "conv2d", need_more_than_there_is)
    forget_accelerator()
    flags = [f"--ckpt={tiny_sdxl}", f"--outdir={tmp_path / 'out'}", f"--prompt_file={lines}", "--W=64", "--H=64"]
    assert sdxl_gen_img.main(flags) == 1
    assert "the image of prompt 1 with seed" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt=a cat"], "--ckpt is missing"),
        (["--ckpt=no.safetensors", "--prompt=a cat"], "--ckpt: there is no 'no.safetensors'"),
        (["--ckpt={}", "--prompt=a cat --w 3"], "--w is '3'"),
        (["--ckpt={}", "--prompt_file=none.txt"], "cannot read the prompt file 'none.txt'"),
        (["--ckpt={}", "--prompt=a cat", "--prompt_file=none.txt"], "exclude each other"),
        (["--ckpt={}", "--prompt=a cat", "--sample_grid"], "--sample_grid needs --prompt_file"),
        (["--ckpt={}", "--prompt=a cat", "--sampler=eular"], "--sampler expects one of"),
        (["--ckpt={}", "--prompt=a cat", "--bf16", "--fp16"], "exclude each other"),
        (["--ckpt={}", "--prompt=a cat", "--network_module=x"], "LoRAs"),
        (["--ckpt={}", "--prompt=a cat", "--images_per_prompt=0"], "--images_per_prompt"),
        (["--ckpt={}", "--prompt=a cat", "--outdir={}"], "cannot make the folder"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(flags, said, tiny_sdxl: Path, capsys, monkeypatch):
    monkeypatch.setattr("library.training.drawing_networks.load_model", None)
    assert sdxl_gen_img.main([flag.format(tiny_sdxl) for flag in flags]) == 2
    written = capsys.readouterr().err
    assert said in written
    assert written.startswith("error: ")
