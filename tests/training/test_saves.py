"""What a run that begins would write over: named, and refused where it is the model that it starts from."""

from pathlib import Path

import pytest

from library.training.saves import SaveOptions, replaces, source_conflicts

SAVES = SaveOptions(output_name="m", save_every_n_steps=100, save_last_n_steps=200, save_every_n_epochs=2)
STATES = SaveOptions(output_name="m", save_every_n_steps=100, save_state=True, save_every_n_minutes=10)


@pytest.mark.parametrize(
    ("options", "name", "suffix", "expected"),
    [
        (SAVES, "m.safetensors", ".safetensors", True),
        (SAVES, "m_ema.safetensors", ".safetensors", True),
        (SAVES, "m-step00000300.safetensors", ".safetensors", True),
        (SAVES, "m-step00000300_ema.safetensors", ".safetensors", True),
        (SAVES, "m-000004.safetensors", ".safetensors", True),
        (SAVES, "m", "", True),
        (SAVES, "m-step00000300", "", True),
        (STATES, "m-state", ".safetensors", True),
        (STATES, "m-step00000300-state", ".safetensors", True),
        (STATES, "m-recent-state", ".safetensors", True),
        (STATES, "m-recent.safetensors", ".safetensors", True),
        (SaveOptions(), "last.ckpt", ".ckpt", True),
        (SAVES, "m-step00000350.safetensors", ".safetensors", False),  # saved at a stop
        (SAVES, "m-000003.safetensors", ".safetensors", False),
        (SAVES, "m-recent.safetensors", ".safetensors", False),
        (SAVES, "m-state", ".safetensors", False),
        (SAVES, "m.ckpt", ".safetensors", False),
        (SAVES, "m.safetensors", "", False),
        (SAVES, "m-step00000300.safetensors", "", False),
        (SAVES, "other.safetensors", ".safetensors", False),
        (SAVES, "m2.safetensors", ".safetensors", False),
        (SaveOptions(), "m.ckpt", ".ckpt", False),
    ],
)
def test_what_a_run_would_write_over_goes_by_its_names(options: SaveOptions, name: str, suffix: str, expected: bool):
    assert replaces(options, name, suffix, has_average=True) == expected


def problems_of(source: Path, output_dir: Path, *, is_measured: bool = False, **options) -> list[str]:
    sources = {"pretrained_model_name_or_path": str(source), "vae": None}
    save = SaveOptions(output_dir=output_dir, output_name="m", **options)
    return list(source_conflicts(save, sources, has_average=False, is_measured=is_measured))


def test_a_run_does_not_write_over_the_model_that_it_starts_from(tmp_path: Path):
    model = tmp_path / "m.safetensors"
    model.touch()
    (tmp_path / "sub").mkdir()
    (problem,) = problems_of(model, tmp_path / "sub" / "..")
    assert f"the run would write its own model over '{model}'. Set another --output_name" in problem
    assert problems_of(model, tmp_path, is_measured=True) == []
    assert problems_of(model, tmp_path, save_model_as="ckpt") == []
    assert problems_of(model, tmp_path / "elsewhere") == []
    folder = tmp_path / "m"
    folder.mkdir()
    assert len(problems_of(folder, tmp_path)) == 1
    assert problems_of(folder, tmp_path, save_model_as="safetensors") == []
    assert problems_of(tmp_path / ("x" * 300), tmp_path) == []  # no file system takes that for a name
