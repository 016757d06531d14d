"""Images and captions from a class of the user."""

from pathlib import Path

import pytest

from library.config.errors import UserError
from library.config.options import problems_of
from library.data.dataset_class import metadata_of_class
from library.data.training_set_options import TrainingSetOptions
from tests.training_images import read_set

MODULE = """
class Cats:
    def __init__(self, folder):
        self.folder = folder

    def __iter__(self):
        for number, path in enumerate(sorted(self.folder.glob("*.png"))):
            yield {"image_path": path.name, "captionL": "style", "captionG": f"cat {number}", "loss_weight": 2}

def nothing(folder):
    return []

def numbers(folder):
    return [1]

def twice(folder):
    return [{"image_path": "a", "captionL": "", "captionG": ""}] * 2

def odd(folder):
    yield {"image_path": "a", "captionL": 3}

a_value = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set_of_cats.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def test_a_class_yields_what_metadata_holds(module, folder):
    for name in "ab":
        folder.add(f"{name}.png")
    options = TrainingSetOptions(train_data_dir=folder.images, dataset_class="set_of_cats.Cats")
    assert problems_of(options) == []
    images = read_set(options, folder.rule, "vae")
    assert [(image.key, image.captions.variants_g, image.loss_weight) for image in images] == [
        ("a.png", ("cat 0",), 2.0),
        ("b.png", ("cat 1",), 2.0),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("set_of_cats.Dogs", "cannot be imported: module 'set_of_cats' has no attribute 'Dogs'"),
        ("set_of_dogs.Dogs", "cannot be imported: No module named 'set_of_dogs'"),
        ("Cats", "is no class"),
        ("set_of_cats.a_value", "is no class"),
        ("set_of_cats.nothing", "yields no images"),
        ("set_of_cats.numbers", "item 0: expected an object with 'image_path', got 1"),
        ("set_of_cats.twice", "item 1: an earlier item has the same image path 'a'"),
        ("set_of_cats.odd", "item 0: expected captionL to be a text or a list of texts, got 3"),
    ],
)
def test_what_is_no_such_class_is_refused(module, tmp_path: Path, name: str, message: str):
    with pytest.raises(UserError, match=message):
        metadata_of_class(name, tmp_path)


def test_a_class_excludes_what_else_names_images(tmp_path: Path):
    (tmp_path / "meta.json").write_text("{}")
    options = TrainingSetOptions(train_data_dir=tmp_path, in_json=tmp_path / "meta.json", dataset_class="a.B")
    assert problems_of(options) == [
        "--in_json and --dataset_class exclude each other: both name the images. Keep one of them."
    ]
