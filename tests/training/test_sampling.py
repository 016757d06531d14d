"""When sample pictures are drawn, and what becomes of them."""

import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from library.config.options import parse_options, problems_of
from library.samples.options import SampleOptions
from library.sdxl.sizes import Size
from library.training.plan import Occasion
from library.training.sampling import SampledRun, Sampling
from library.training.tracking import Tracker, TrackingOptions

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "prompt_lines.json").read_text(encoding="utf-8"))
GOLDEN_BY_STEP = {case["steps"]: case["files"] for case in GOLDEN["when"] if case["epoch"] is None}
PROMPTS = "a cat --d 7 --s 1\na dog --e photographic --s 1 --w 64 --h 96\n"  # as golden: a fixed seed, then none


@pytest.fixture
def sampling(tmp_path: Path, tiny_networks, fresh_accelerate):
    """`sampling("--flag", ...)` for `PROMPTS`, into tmp_path, at 64x64 where a line gives no size.

    Whether the run is to stop is looked at before each picture; `stop_at_look` says when it is.
    """
    path = tmp_path / "my prompts.txt"

    def make(
        *flags: str, seed: int = 1, prompts: str = PROMPTS, stop_at_look: float = math.inf, average=nullcontext
    ) -> Sampling:
        path.write_text(prompts, encoding="utf-8")
        (options,) = parse_options([SampleOptions], [f"--sample_prompts={path}", *flags], description="")
        looks = itertools.count(1)
        tracker = Tracker(Accelerator(cpu=True), TrackingOptions(), num_steps=1, steps_per_epoch=1)
        return Sampling(
            options,
            tiny_networks,
            tracker,
            SampledRun(tmp_path, "finetuned_model", Size(64, 64), seed),
            is_stopping=lambda: next(looks) >= stop_at_look,
            weight_sets={"": nullcontext, "ema": average},
        )

    return make


def drawn(folder: Path) -> list[str]:
    """Names of the pictures, their times as golden writes them."""
    names = sorted(path.name for path in (folder / "sample").glob("*")) if (folder / "sample").exists() else []
    return [re.sub(r"_\d{14}_", "_YYYYmmddHHMMSS_", name) for name in names]


@pytest.mark.parametrize("case", GOLDEN["when"], ids=lambda case: f"{case['flags'][0]} {case['epoch']} {case['steps']}")
def test_pictures_are_drawn_when_the_reference_draws_them(case: dict, sampling, tmp_path: Path):
    # At the end of an epoch the reference asks a second time, for samples by epoch: they exclude those by step.
    asks_twice = case["epoch"] is not None and "--sample_every_n_steps=10" in case["flags"]
    made = sampling(*case["flags"])
    made.after_step(Occasion(case["steps"], case["epoch"]))
    assert drawn(tmp_path) == (GOLDEN_BY_STEP[case["steps"]] if asks_twice else case["files"])


def test_by_epoch_they_are_drawn_after_every_nth_and_named_by_it(sampling, tmp_path: Path):
    made = sampling("--sample_every_n_epochs=2")
    made.after_step(Occasion(10))
    made.after_step(Occasion(5, 1))
    assert drawn(tmp_path) == []
    made.after_step(Occasion(10, 2))
    assert drawn(tmp_path) == [
        "finetuned_model_YYYYmmddHHMMSS_e000002_00_7.png",
        "finetuned_model_YYYYmmddHHMMSS_e000002_01.png",
    ]


def test_pictures_say_which_prompts_and_seeds_made_them(sampling, tmp_path: Path):
    sampling("--sample_at_first", "--sample_sampler=k_euler").after_step(Occasion(0))
    with Image.open(next((tmp_path / "sample").glob("*_00_7.png"))) as first:
        assert first.size == (64, 64)
        assert (first.info["prompt_g"], first.info["prompt_l"], first.info["seed"]) == ("a cat", "a cat", "7")
        assert first.info["sampler"] == "k_euler"
    with Image.open(next((tmp_path / "sample").glob("*_01.png"))) as second:
        assert second.size == (64, 96)
        assert (second.info["prompt_g"], second.info["prompt_l"]) == ("a dog", "photographic")


def test_without_a_fixed_seed_each_step_draws_another_that_the_runs_seed_decides(sampling, tmp_path: Path):
    def seed_of_the_dog(run_seed: int, step: int) -> str:
        sampling("--sample_every_n_steps=1", seed=run_seed).after_step(Occasion(step))
        path = max((tmp_path / "sample").glob("*_01.png"))
        with Image.open(path) as image:
            seed = image.info["seed"]
        path.unlink()
        return seed

    first = seed_of_the_dog(1, step=1)
    assert seed_of_the_dog(1, step=1) == first
    assert seed_of_the_dog(1, step=2) != first
    assert seed_of_the_dog(2, step=1) != first


def test_the_moving_average_is_drawn_beside_the_weights_after_the_first_step(sampling, tiny_networks, tmp_path: Path):
    weights = tiny_networks.unet.conv_out.weight.data

    @contextmanager
    def average() -> Iterator[None]:
        weights.mul_(2)
        yield
        weights.div_(2)

    prompts = "a cat --d 7 --s 1\n"
    for step in (0, 1):
        sampling("--sample_every_n_steps=1", "--sample_ema", prompts=prompts, average=average).after_step(
            Occasion(step)
        )
    start = "finetuned_model_YYYYmmddHHMMSS_00000"
    assert drawn(tmp_path) == [f"{start}0_00_7.png", f"{start}1_00_7.png", f"{start}1_00_7_ema.png"]
    before, raw, averaged = (
        Image.open(next((tmp_path / "sample").glob(end))) for end in ("*_000000_00_7.png", "*1_00_7.png", "*_ema.png")
    )
    assert before.tobytes() == raw.tobytes() != averaged.tobytes()
    assert (raw.info["model"], averaged.info["model"]) == ("finetuned_model", "finetuned_model_ema")


def test_no_picture_is_begun_once_the_run_is_to_stop(sampling, capsys, tmp_path: Path):
    sampling("--sample_every_n_steps=3", stop_at_look=2).after_step(Occasion(3))
    assert drawn(tmp_path) == ["finetuned_model_YYYYmmddHHMMSS_000003_00_7.png"]
    assert "step 3: the run stops, 1 images are not drawn" in capsys.readouterr().out


def test_a_picture_without_memory_for_it_is_named_and_the_next_one_drawn(
    sampling, tiny_networks, capsys, tmp_path: Path
):
    def need_more_than_there_is(unet, inputs) -> None:
        if inputs[0].shape[-1] == 96 // 8:
            torch.empty(2**55)

    made = sampling("--sample_at_first", prompts="a cat --e photo --s 1 --w 96\na dog --e photo --s 1\n")
    hook = tiny_networks.unet.register_forward_pre_hook(need_more_than_there_is)
    try:
        made.after_step(Occasion(0))
    finally:
        hook.remove()
    assert "step 0: the image of prompt 1 is not drawn: " in capsys.readouterr().err
    assert drawn(tmp_path) == ["finetuned_model_YYYYmmddHHMMSS_000000_01.png"]


def test_lines_without_an_l_prompt_are_named_once(sampling, capsys, tmp_path: Path):
    made = sampling("--sample_every_n_steps=1")
    made.after_step(Occasion(1))
    made.after_step(Occasion(2))
    said = capsys.readouterr().out
    assert said.count("no --e in line 1: both encoders read one prompt") == 1


# -- the grid ---------------------------------------------------------------------------------------------------------

GRID = """a cat --e photographic --d 7 --s 1 --w 64 --h 64
a dog --e photographic --s 5
a cat --e anime --s 5
a fish --s 5
"""


def test_the_grid_is_drawn_before_the_first_step_and_after_the_last(sampling, tmp_path: Path):
    made = sampling("--sample_grid", prompts=GRID)
    made.after_step(Occasion(0))
    for step in (1, 2):
        made.after_step(Occasion(step))
    made.after_step(Occasion(3, 1, is_last=True))
    assert drawn(tmp_path) == [
        "finetuned_model_YYYYmmddHHMMSS_000000_grid.png",
        "finetuned_model_YYYYmmddHHMMSS_000003_grid.png",
    ]


def test_the_grid_says_its_rows_and_columns_and_the_settings_of_the_first_line(sampling, tmp_path: Path):
    sampling("--sample_grid", prompts=GRID).after_step(Occasion(0))
    with Image.open(next((tmp_path / "sample").glob("*_grid.png"))) as grid:
        assert json.loads(grid.info["rows_prompt_l"]) == ["photographic", "anime"]
        assert json.loads(grid.info["columns_prompt_g"]) == ["a cat", "a dog", "a fish"]
        assert (grid.info["seed"], grid.info["steps"], grid.info["size"]) == ("7", "1", "64x64")
        assert grid.width > 3 * 64 and grid.height > 2 * 64  # and its labels


def test_without_a_seed_in_the_first_line_the_grid_has_the_same_one_before_and_after(sampling, tmp_path: Path):
    made = sampling("--sample_grid", prompts="a cat --e photographic --s 1\n")
    made.after_step(Occasion(0))
    made.after_step(Occasion(3, 1, is_last=True))
    before, after = sorted((tmp_path / "sample").glob("*_grid.png"))
    assert before.name != after.name
    with Image.open(before) as first, Image.open(after) as second:
        assert first.info["seed"] == second.info["seed"]


def test_a_run_says_which_image_it_draws(sampling, capsys):
    sampling("--sample_every_n_steps=1", "--sample_grid").after_step(Occasion(0))
    said = [line for line in capsys.readouterr().out.splitlines() if "drawing" in line]
    assert said == [
        *("step 0: drawing sample 1 of 2", "step 0: drawing sample 2 of 2", "step 0: drawing the grid of 2 images")
    ]


def test_a_grid_that_only_one_end_of_the_run_draws_is_told(sampling, capsys):
    made = sampling("--sample_grid", prompts=GRID)
    for occasion in (Occasion(2, is_resumed=True), Occasion(3)):
        made.after_step(occasion)
    assert (
        capsys.readouterr().out.count("there is no grid from before the first step; one is drawn after the last") == 1
    )
    sampling("--sample_grid", prompts=GRID).after_step(Occasion(1))
    assert "there is no grid" not in capsys.readouterr().out


def test_a_grid_that_a_stop_interrupts_is_not_saved_half_empty(sampling, capsys, tmp_path: Path):
    sampling("--sample_grid", prompts=GRID, stop_at_look=4).after_step(Occasion(0))
    assert drawn(tmp_path) == []
    assert "step 0: the run stops, 3 images are not drawn" in capsys.readouterr().out


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"sample_every_n_steps": 5}, "need --sample_prompts."),
        ({"sample_at_first": True}, "need --sample_prompts."),
        ({"sample_grid": True}, "need --sample_prompts."),
        ({"sample_prompts": "p.txt", "sample_grid": True}, "no line of the prompt file has an L prompt. Add --e"),
        ({"sample_prompts": "p.txt"}, "nothing says when to draw"),
        ({"sample_prompts": "p.txt", "sample_every_n_steps": -1}, "--sample_every_n_steps is -1"),
        ({"sample_prompts": "p.txt", "sample_every_n_steps": 1, "sample_every_n_epochs": 1}, "exclude each other"),
        ({"sample_prompts": "none.txt", "sample_at_first": True}, "cannot read the prompt file"),
    ],
)
def test_each_mistake_is_one_sentence(flags: dict, problem: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat", encoding="utf-8")
    if "sample_prompts" in flags:
        flags = {**flags, "sample_prompts": Path(flags["sample_prompts"])}
    options = SampleOptions(**flags)
    [found] = problems_of(options) or list(options.heavy_problems())
    assert problem in found
