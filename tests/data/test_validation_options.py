"""When validation is due, at which timesteps, and what cannot work."""

import pytest

from library.config.options import problems_of
from library.data.validation_options import ValidationOptions

OTHERS = {"has_dataset_config": False, "only_measures": False, "resumes": False}


def due(options: ValidationOptions, num_steps: int = 12, steps_per_epoch: int = 3) -> list[int]:
    """The steps after which a run is validated."""
    return [
        step
        for step in range(num_steps + 1)
        if options.is_due(
            step,
            step // steps_per_epoch if step % steps_per_epoch == 0 or step == num_steps else None,
            is_last=step == num_steps,
        )
    ]


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({}, [3, 6, 9, 12]),
        ({"validate_every_n_steps": 5}, [5, 10, 12]),
        ({"validate_every_n_epochs": 2}, [6, 12]),
        ({"validate_every_n_steps": 5, "validate_every_n_epochs": 3}, [5, 9, 10, 12]),
        ({"validate_at_first": True, "validate_every_n_epochs": 100}, [0, 12]),
    ],
)
def test_it_is_due_as_often_as_asked_and_at_the_end(flags, steps: list[int]):
    assert due(ValidationOptions(**flags)) == steps


def test_timesteps_are_the_middles_of_ten_equal_parts_of_the_trained_range():
    assert ValidationOptions().timesteps(range(1000)) == (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
    assert ValidationOptions().timesteps(range(100, 900)) == (140, 220, 300, 380, 460, 540, 620, 700, 780, 860)
    assert ValidationOptions().timesteps(range(4, 6)) == (4, 5)
    assert ValidationOptions(validation_timesteps=[900, 100]).timesteps(range(1000)) == (100, 900)


def test_what_cannot_work_is_said():
    assert [*map(str, problems_of(ValidationOptions(validation_timesteps=[5, 1000, 5])))] == [
        "--validation_timesteps has 1000; it must be from 0 to 999.",
        "--validation_timesteps has a timestep twice; name each once.",
    ]
    assert "--validation_split is 1.5" in problems_of(ValidationOptions(validation_split=1.5))[0]


def test_flags_without_images_are_refused():
    options = ValidationOptions(validate_every_n_steps=5, validation_ablation=True)
    [said] = options.conflicts(**OTHERS)
    assert said == (
        "--validate_every_n_steps and --validation_ablation: no images are held out; set --validation_split, such as "
        "0.1."
    )
    assert not [*options.conflicts(**OTHERS | {"has_dataset_config": True})]  # which may name them
    assert not [*ValidationOptions(validation_seed=3).conflicts(**OTHERS)]


def test_a_run_without_steps_needs_something_to_measure():
    measuring = OTHERS | {"only_measures": True}
    [said] = ValidationOptions().conflicts(**measuring)
    assert "there is nothing to do" in said
    at_first = ValidationOptions(validation_split=0.1, validate_at_first=True)
    assert not [*at_first.conflicts(**measuring)]
    [said] = at_first.conflicts(**measuring | {"resumes": True})
    assert "leave out --resume" in said
