"""Metadata as other programs write it trains as it is: the captions that reach the U-Net, on the tiny SDXL."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import PreparedSet, Run

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture
def write_json(prepared_set: PreparedSet, tmp_path: Path) -> Callable[..., str]:
    """`write_json(change)` is the flag of metadata whose entries `change(captionL, captionG)` makes; buckets stay."""

    def write(change: Callable[[str, str], dict[str, Any]]) -> str:
        entries = json.loads(prepared_set.latents_json.read_text(encoding="utf-8"))
        changed = {
            key: change(entry["captionL"], entry["captionG"]) | {"train_resolution": entry["train_resolution"]}
            for key, entry in entries.items()
        }
        path = tmp_path / f"meta {len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(changed), encoding="utf-8")
        return f"--in_json={path}"

    return write


def assert_equal(run: Run, other: Run) -> None:
    """Same weights, bit for bit."""
    one, two = run.weights(), other.weights()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], weight) for name, weight in two.items())


@pytest.fixture(scope="module")
def own_form(train) -> Run:
    """A run on the metadata of this project."""
    return train()


def test_metadata_of_sd_scripts_trains_tags_as_l_and_captions_as_g(train, own_form: Run, write_json, capsys):
    kohya = train(write_json(lambda caption_l, caption_g: {"tags": caption_l, "caption": caption_g}))
    assert "3 images: L from 'tags', G from 'caption'" in capsys.readouterr().out
    assert_equal(kohya, own_form)


@pytest.mark.slow
def test_one_caption_trains_both_encoders_with_caption_and_tags(train, write_json):
    kohya = write_json(lambda tags, caption: {"tags": tags, "caption": caption})
    joined = write_json(lambda tags, caption: dict.fromkeys(("captionL", "captionG"), f"{caption},{tags}"))
    assert_equal(train(kohya, "--one_caption"), train(joined))


@pytest.mark.slow
def test_the_first_of_listed_captions_is_trained(train, own_form: Run, write_json):
    listed = write_json(lambda caption_l, caption_g: {"captionL": [caption_l, "x"], "captionG": f"{caption_g}\ny"})
    assert_equal(train(listed), own_form)


def test_jsonl_trains(train, own_form: Run, prepared_set: PreparedSet, tmp_path: Path):
    entries = json.loads(prepared_set.latents_json.read_text(encoding="utf-8"))
    lines = [
        {"image_path": f"{key}.jpg", "tags": entry["captionL"], "caption": entry["captionG"]}
        | {"train_resolution": entry["train_resolution"]}
        for key, entry in entries.items()
    ]
    path = tmp_path / "meta lat.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert_equal(train(f"--in_json={path}"), own_form)
