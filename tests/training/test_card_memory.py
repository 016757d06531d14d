"""The memory of a step by arithmetic: as much as a rehearsal counts, and refused with flags that make it fit."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.rehearsal.cases import cases, documented_recipes
from demo.random_sdxl import TINY
from library.config.errors import UserError
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.options import parse_options
from library.sdxl.architecture import SDXL_BASE, empty_model
from library.training import card_memory
from library.training.card_memory import GIB, Batch, CardMemory, largest_batch, require_card_memory
from library.training.run_options import OPTION_CLASSES, TrainingOptions
from tests.conftest import base_flags

COUNTED = json.loads((Path(__file__).parents[2] / "benchmarks/results/rehearsal_full.json").read_text())["cases"]
CARD = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def memory() -> CardMemory:
    return CardMemory(SDXL_BASE, [])


@pytest.fixture
def options_of(tmp_path: Path):
    """`options_of(*flags)`: the options of a run with these flags."""
    (tmp_path / "meta.json").write_text("{}", encoding="utf-8")
    flags = base_flags("some/model", tmp_path / "meta.json", tmp_path, tmp_path / "output")

    def options(*more: str) -> TrainingOptions:
        command = [flag for flag in flags if not flag.startswith("--resolution")]
        argv = [*command, "--resolution=1024", *more]
        return TrainingOptions(*parse_options(OPTION_CLASSES, argv, description="", spellings=TRAINER_SPELLINGS))

    return options


def images(options: TrainingOptions, *buckets: tuple[int, int]) -> SimpleNamespace:
    """Images of one subset, in columns; (0, 0) is the bucket of one that metadata do not tell."""
    subset = SimpleNamespace(batch_size=options.loader.train_batch_size)
    columns = np.array(buckets or [(0, 0)], np.int32)
    return SimpleNamespace(subsets=(subset,), subset_of=np.zeros(len(columns), np.int32), buckets=columns)


@pytest.fixture(scope="module")
def full_size():
    return empty_model(SDXL_BASE)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, options_of, full_size):
    """`refused(gib, free, *flags)`: what is said of a run on a card of so many GiB, None if it may begin."""

    def check(gib: float, free: float, *flags: str, architecture=SDXL_BASE) -> str | None:
        if architecture is SDXL_BASE:  # which takes seconds to build
            monkeypatch.setattr(card_memory, "empty_model", lambda _: full_size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * GIB))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, gib * GIB))
        options = options_of(*flags)
        try:
            require_card_memory(options, lambda: architecture, images(options), [], CARD)
        except UserError as error:
            return str(error)
        return None

    return check


@pytest.mark.parametrize("recipe", documented_recipes())
def test_every_recipe_takes_as_much_as_its_rehearsal_counts(recipe: str, memory: CardMemory, options_of):
    options = options_of(*documented_recipes()[recipe])
    batch = Batch(options.loader.train_batch_size, 1024 * 1024)
    assert 0.95 < memory.total(options, batch) / GIB / COUNTED[recipe]["peak_gib"] < 1.01


def test_an_optimizer_that_needs_all_weights_at_once_takes_float32_copies_of_all(memory: CardMemory, options_of):
    pytest.importorskip("prodigyopt")
    case = cases()["Prodigy"]
    total = memory.total(options_of(*(case.flags or ())), Batch(1, 1024 * 1024))
    assert 0.95 < total / GIB / COUNTED["Prodigy"]["peak_gib"] < 1.01


@pytest.mark.parametrize("recipe", ["24 GB", "80 GB"])
def test_a_recipe_that_does_not_fit_is_refused_with_flags_with_which_it_does(recipe: str, refused):
    flags = documented_recipes()[recipe]
    said = refused(8, 8, *flags)
    assert said is not None
    assert "and the GPU has 8.0 GiB. Pass " in said
    named = shlex.split(said.partition("Pass ")[2].partition(": it then")[0])
    kept = flags[: flags.index("--optimizer_args")] if "--optimizer_args" in flags else flags
    assert refused(8, 8, *kept, *named) is None


def test_only_flags_that_are_needed_are_named(refused):
    recipe = documented_recipes()["24 GB"]
    assert "Pass --cache_text_encoder_outputs: it then" in str(refused(16, 16, *recipe))


def test_a_card_that_is_too_small_for_anything_is_told_so(refused):
    assert "Even with " in str(refused(4, 4, *documented_recipes()["8 GB"]))


def test_other_programs_on_the_card_are_a_warning(refused, capsys: pytest.CaptureFixture[str]):
    assert refused(8, 3, *documented_recipes()["8 GB"]) is None
    assert "other programs leave 3.0 GiB of the GPU's 8.0 GiB" in capsys.readouterr().err


def test_the_largest_bucket_counts(options_of):
    options = options_of("--train_batch_size=3")
    assert largest_batch(options, images(options)) == Batch(3, 1024 * 1024)
    assert largest_batch(options, images(options, (512, 512), (64, 128))) == Batch(3, 512 * 512)


def test_a_tiny_model_fits_and_a_cpu_is_not_asked(refused, options_of):
    assert refused(1, 1, "--train_batch_size=1", architecture=TINY) is None
    options = options_of()
    assert require_card_memory(options, lambda: pytest.fail("read"), images(options), [], torch.device("cpu")) is None
