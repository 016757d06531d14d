"""From caption files to the U-Net's inputs: each caption reaches its own features, and not a bit of the other's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import PreparedSet, merge_captions

WIDTH_L, WIDTH_G = 32, 48  # of the tiny SDXL; 768 and 1280 of the true one


@pytest.fixture
def conditioning(train, prepared_set: PreparedSet, unet_inputs, tmp_path: Path) -> Callable[..., dict]:
    """`conditioning(caption_l, caption_g)` writes the captions of one picture, merges all into metadata, trains a step.

    What comes back is what the U-Net was given of that picture, in both precisions of training.
    """

    def of(caption_l: str, caption_g: str, *flags: str) -> dict[str, torch.Tensor]:
        copied = prepared_set.without_latents(tmp_path / f"set {len(list(tmp_path.iterdir()))}")
        for path in copied.images.iterdir():
            if path.stem != "astronaut":
                path.unlink()
        copied.captions_json.unlink()
        (copied.images / "astronaut.txt").write_text(caption_l, encoding="utf-8")
        (copied.images / "astronaut.caption").write_text(caption_g, encoding="utf-8")
        merge_captions(copied)
        unet_inputs.clear()
        train(f"--in_json={copied.captions_json}", f"--train_data_dir={copied.images}", "--max_train_steps=1", *flags)
        [inputs] = unet_inputs
        return inputs

    return of


def features_l(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["hidden"][..., :WIDTH_L]


def features_g(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["hidden"][..., WIDTH_L:]


@pytest.mark.parametrize(
    "flags",
    [[], ["--mixed_precision=bf16", "--full_bf16", "--max_token_length=150"]],
    ids=["float32", "bfloat16, two chunks"],
)
def test_each_caption_file_changes_the_features_of_its_own_encoder_alone(flags: list[str], conditioning):
    first = conditioning("photographic", "a woman in a space suit", *flags)
    other_g = conditioning("photographic", "a cat", *flags)
    other_l = conditioning("anime", "a woman in a space suit", *flags)
    assert first["hidden"].shape[-1] == WIDTH_L + WIDTH_G
    assert first["pooled"].shape == (1, WIDTH_G)

    assert torch.equal(features_l(other_g), features_l(first))
    assert not torch.equal(features_g(other_g), features_g(first))
    assert not torch.equal(other_g["pooled"], first["pooled"])

    assert not torch.equal(features_l(other_l), features_l(first))
    assert torch.equal(features_g(other_l), features_g(first))
    assert torch.equal(other_l["pooled"], first["pooled"])

    for name in ("sample", "timestep", "time_ids"):
        assert torch.equal(other_g[name], first[name])
        assert torch.equal(other_l[name], first[name])


def test_no_feature_of_a_changed_caption_stays_behind_its_first_token(conditioning):
    # The start token reads nothing before it; every later position reads the words, the padding included.
    first = conditioning("photographic", "a woman in a space suit")
    both = conditioning("anime", "cat")
    for features in (features_l, features_g):
        is_same = (features(first) == features(both)).all(dim=-1)[0]
        assert is_same.tolist() == [True] + [False] * 76
