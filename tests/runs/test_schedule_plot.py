"""--plot_schedule: the rates of a run as an image, before a model is loaded."""

from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

import sdxl_train
from library.optim.curve_image import draw_curves, equal_together, ticks
from library.optim.optimizers import rates_of_parts
from library.optim.options import OptimizerOptions
from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags

BLUE, RED = (0x1F, 0x77, 0xB4), (0xD6, 0x27, 0x28)
RIGHT_OF_AXES = 900  # pixels: the names begin there


def heights(image: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    """For each column of the axes in which a curve has this colour, the row of its upper edge, from left to right."""
    pixels = image.convert("RGB").load()
    columns = [[y for y in range(image.height) if pixels[x, y] == colour] for x in range(RIGHT_OF_AXES - 15)]
    return [rows[0] for rows in columns if rows]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with everything that a command names; the model is none, and nobody reads it."""
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_text("nothing", encoding="utf-8")
    Path("images").mkdir()
    Image.new("RGB", (64, 64)).save("images/01.png")
    Path("meta.json").write_text('{"01": {"captionL": "", "captionG": ""}}', encoding="utf-8")
    return tmp_path


def test_each_part_is_drawn_over_the_run_and_nothing_is_trained(folder: Path, capsys):
    argv = base_flags("model.safetensors", "meta.json", "images", "output")
    flags = ["--train_text_encoder", "--learning_rate=1e-5", "--learning_rate_te2=5e-6", "--stop_training_te2=0.5"]
    more = ["--lr_scheduler=linear", "--max_train_steps=30", "--plot_schedule=rates.png"]
    assert sdxl_train.main([*argv, *flags, *more]) == 0
    assert capsys.readouterr().out == "wrote 'rates.png'\n"
    assert not Path("output").exists()
    unet_and_l, g = (heights(Image.open("rates.png"), colour) for colour in (BLUE, RED))
    assert all(later >= sooner - 2 for sooner, later in pairwise(unet_and_l)), "falls; its edge is uneven"
    assert len(set(unet_and_l)) > 100
    assert min(g) > min(unet_and_l), "half the rate"
    frozen = g[int(len(g) * 0.6) :]
    assert min(frozen) >= max(g) - 2, "frozen in the middle"


def test_epochs_are_counted_in_the_images(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    titles = []
    monkeypatch.setattr(
        "library.runs.schedule_plot.draw_curves",
        lambda title, *rest: titles.append(title) or draw_curves(title, *rest),
    )
    argv = [
        *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, "output"),
        *("--resolution=128,128", *BUCKET_FLAGS, "--max_train_epochs=4", "--plot_schedule=rates.png"),
    ]
    assert sdxl_train.main(argv) == 0
    assert titles == ["learning rate: constant, 12 steps"]


def test_a_schedule_that_cannot_be_made_is_one_line(folder: Path, capsys):
    argv = base_flags("model.safetensors", "meta.json", "images", "output")
    assert sdxl_train.main([*argv, "--lr_scheduler_type=OneCycleLR", "--plot_schedule=rates.png"]) == 2
    assert "OneCycleLR refuses its arguments: OneCycleLR.__init__() missing 1 required" in capsys.readouterr().err
    assert not Path("rates.png").exists()


def test_equal_curves_are_drawn_as_one_with_the_names_of_all():
    options = OptimizerOptions(block_lr=",".join(["1e-5"] * 20 + ["0", "2e-5", "1e-5"]))
    curves = {name: [rate, 0.0] for name, rate in rates_of_parts(options).items() if name.startswith("unet")}
    assert list(equal_together(curves)) == ["unet block 0-19, 22", "unet block 20", "unet block 21"]


def test_ticks_are_round_and_reach_the_highest_value():
    assert ticks(1e-5) == pytest.approx([0, 2e-6, 4e-6, 6e-6, 8e-6, 1e-5])
    assert ticks(7) == pytest.approx([0, 2, 4, 6, 8])
    assert ticks(0) == [0, 1]
    for highest in (1e-7, 0.3, 1.1, 999):
        assert ticks(highest)[-1] >= highest > ticks(highest)[-2]
