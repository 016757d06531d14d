"""What has changed since a state was made: what is only named, and what stops the run."""

import pytest

from library.config.errors import UserError
from library.training.progress import Setting
from library.training.resume import ResumeOptions, check_images, check_options

THEN = Setting({"train_batch_size": "1", "learning_rate": "1e-05", "seed": "7"}, {}, {"torch": "2.11"})
IMAGES = {"01": "aa", "02": "bb", "03": "cc"}


def changed(**options: str) -> Setting:
    return Setting(THEN.options | options, {}, {"torch": "2.11"})


def test_nothing_is_said_where_nothing_has_changed():
    assert check_options(THEN, changed(), anyway=False) == []
    assert check_images(IMAGES, dict(IMAGES), anyway=False) == []


def test_what_does_no_harm_is_named():
    now = Setting(THEN.options | {"learning_rate": "1e-06"}, {}, {"torch": "2.12"})
    assert check_options(THEN, now, anyway=False) == [
        "torch: 2.11 then, 2.12 now",
        "--learning_rate: 1e-05 then, 1e-06 now",
    ]


def test_what_makes_another_run_stops_with_its_name_unless_told_otherwise():
    with pytest.raises(UserError, match=r"--train_batch_size: 1 then, 2 now.*--resume_anyway"):
        check_options(THEN, changed(train_batch_size="2"), anyway=False)
    assert check_options(THEN, changed(train_batch_size="2"), anyway=True) == ["--train_batch_size: 1 then, 2 now"]


def test_the_same_step_may_be_shared_by_another_number_of_processes_unless_noise_depends_on_it():
    then = changed(gradient_accumulation_steps="2", num_processes="1")
    split, larger = (changed(gradient_accumulation_steps="1", num_processes=number) for number in ("2", "3"))
    assert check_options(then, split, anyway=False) == [
        "--gradient_accumulation_steps: 2 then, 1 now",
        "--num_processes: 1 then, 2 now",
    ]
    for now, splits_alike in ((larger, True), (split, False)):
        with pytest.raises(UserError, match=r"--num_processes: 1 then, \d now"):
            check_options(then, now, anyway=False, splits_alike=splits_alike)
    with pytest.raises(UserError, match="Set --gradient_accumulation_steps so that"):
        check_options(then, larger, anyway=False)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (IMAGES | {"04": "dd"}, "1 images added: 04"),
        ({"01": "aa", "02": "bb"}, "1 images removed: 03"),
        (IMAGES | {"02": "xx"}, "1 images with another image, bucket, caption or kind of latents: 02"),
        (dict(reversed(IMAGES.items())), "the images are in another order in the metadata"),
    ],
)
def test_other_images_stop_with_their_names_unless_told_otherwise(now: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        check_images(IMAGES, now, anyway=False)
    assert check_images(IMAGES, now, anyway=True) == [message]


def test_going_on_anyway_needs_something_to_go_on_from():
    assert list(ResumeOptions(resume_anyway=True).problems()) == ["--resume_anyway needs --resume."]
