"""Validation in whole runs: what is measured, that training does not notice it, and that stops change nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdxl_train
from library.config.errors import UserError
from library.images.crops import Crop
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.sdxl.sizes import Size
from library.sdxl.text_encoding import encode_captions
from library.sdxl.tokenizers import tokenize_captions
from library.training import validation
from library.training.ablation import ABLATIONS, BOTH
from library.training.resume import check_validation
from library.training.run_record import RECORD_FOLDER
from library.training.stopping import STOP_FILE
from library.training.tracking import Tracker
from library.training.validation_set import batches_of, first_batches
from library.training.validation_texts import readings_of
from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags, forget_accelerator
from tests.outcome import differences, outcome_of
from tests.training_images import captioned, image_of, subset_of

pytestmark = pytest.mark.trains

# Holds out chelsea and astronaut, which are of one bucket.
SPLIT = ("--validation_split=0.85", "--validation_seed=1", "--train_batch_size=2")
KEYS = ("astronaut", "chelsea")  # in the order of their hashes


def test_training_does_not_notice_what_is_measured(train, prepared_set: PreparedSet, tmp_path: Path):
    entries = json.loads(prepared_set.latents_json.read_text(encoding="utf-8"))
    (tmp_path / "trained.json").write_text(json.dumps({"coffee": entries["coffee"]}), encoding="utf-8")
    without = train(f"--in_json={tmp_path / 'trained.json'}", "--max_train_steps=2", "--train_batch_size=2")
    flags = (*SPLIT, "--validation_ablation", "--validate_every_n_steps=1", "--validation_timesteps", "800")
    measured = train(*flags, "--max_train_steps=2")
    curves = {"validation/loss", *(f"validation/{name}" for name in ABLATIONS)}
    of_worth = {f"worth/{name}{band}" for name in ("l", "g", "interaction") for band in ("", "/high")}
    errors = {f"{name}/standard_error" for name in of_worth}
    tags = set(measured.events().Tags()["scalars"])
    assert {tag for tag in tags if tag.startswith(("validation", "worth"))} == curves | of_worth | errors
    expected, found = without.weights(), measured.weights()
    assert [name for name, weights in expected.items() if not torch.equal(weights, found[name])] == []
    assert without.logged("loss/current") == measured.logged("loss/current")
    lines = [json.loads(line) for line in next(measured.logs.glob("*/validation.jsonl")).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert [np.float32(line["losses"]["loss"]) for line in lines] == measured.logged("validation/loss")


@pytest.fixture(scope="module")
def blind_model(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose cross-attention ignores the features of L."""
    tensors, path = load_file(tiny_sdxl), tmp_path_factory.mktemp("blind") / "blind.safetensors"
    width_l = tensors["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"].shape[1]
    for name, tensor in tensors.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            tensor[:, :width_l] = 0
    with safe_open(tiny_sdxl, "pt") as file:
        save_file(tensors, path, file.metadata())
    return path


def test_a_finished_model_is_measured_and_nothing_saved(train, blind_model: Path, prepared_set: PreparedSet, capsys):
    run = train(
        *(f"--pretrained_model_name_or_path={blind_model}", *SPLIT, "--validation_ablation", "--max_train_steps=0"),
        *("--validate_at_first", "--validation_timesteps", "300", "800", "--lr_warmup_steps=100"),
        "--lr_scheduler=cosine",
    )
    assert [path.name for path in run.output.iterdir()] == [RECORD_FOLDER]
    for name in ("l", "l/low", "l/high", "interaction", "l/standard_error"):
        assert run.logged(f"worth/{name}") == [0.0]
    assert run.logged("worth/g")[0] != 0
    assert run.logged("validation/other_l") == run.logged("validation/loss")
    said = capsys.readouterr().out
    assert "validation: 2 images are held out (astronaut, chelsea), 2 timesteps, 8 conditions" in said
    assert "step 0: validation loss" in said
    assert "L is worth 0.0000 +- 0.0000 (0.0 %), no more than chance explains; G" in said

    # The losses are those that diffusers computes for the noise of each image.
    found = losses_by_diffusers(blind_model, prepared_set)
    for name, loss in found.items():
        assert run.logged(f"validation/{name}") == [pytest.approx(loss, rel=1e-5)], name
    assert len({round(loss, 9) for loss in found.values()}) == len(found)


def losses_by_diffusers(model: Path, prepared_set: PreparedSet) -> dict[str, float]:
    """The mean losses of the images that are held out, without any code of training."""
    networks = read_single_file(model, ModelDtypes(*[torch.float32] * 4))
    entries = json.loads(prepared_set.latents_json.read_text(encoding="utf-8"))
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    caches = [np.load(prepared_set.images / f"{key}.npz") for key in KEYS]
    latents = torch.stack([torch.from_numpy(cache["latents"]) for cache in caches]) * 0.13025
    sizes = torch.tensor(
        [[*cache["original_size"][::-1], cache["crop_ltrb"][1], cache["crop_ltrb"][0], 128, 128] for cache in caches],
        dtype=torch.float32,
    )
    l, g = ([entries[key][caption] for key in KEYS] for caption in ("captionL", "captionG"))  # noqa: E741
    texts = {BOTH: encoded(networks, l, g), "without_g": encoded(networks, l, ["", ""])}
    texts |= {"exchanged": encoded(networks, g, l)}
    texts |= {"without_pooled": texts[BOTH]._replace(pooled=texts["without_g"].pooled)}
    losses: dict[str, list[float]] = {name: [] for name in texts}
    for timestep in (300, 800):
        noise = torch.stack([validation.noise_of(1, key, timestep, latents.shape[1:]) for key in KEYS])
        noisy = schedule.add_noise(latents, noise, torch.tensor([timestep] * 2))
        for name, text in texts.items():
            added = {"text_embeds": text.pooled, "time_ids": sizes}
            with torch.no_grad():
                predicted = networks.unet(noisy, timestep, text.hidden, added_cond_kwargs=added).sample
            losses[name].append(float((predicted - noise).square().mean()))
    return {name: float(np.mean(each)) for name, each in losses.items()}


def encoded(networks, captions_l: list[str], captions_g: list[str]):
    tokens = tokenize_captions(captions_l, captions_g, 1)
    with torch.no_grad():
        return encode_captions(networks.text_encoder_l, networks.text_encoder_g, tokens)


@pytest.mark.slow  # several runs
def test_a_stop_in_a_validation_changes_nothing(
    tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path, monkeypatch, capsys
):
    def run(name: str, *flags: str) -> int:
        forget_accelerator()
        argv = base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, tmp_path / name)
        argv += ["--output_name=m", "--resolution=128,128", "--seed=7", "--enable_bucket", *BUCKET_FLAGS]
        argv += ["--max_train_steps=2", "--max_data_loader_n_workers=0", *SPLIT, "--validation_timesteps", "300"]
        argv += ["--train_text_encoder", "--optimizer_type=AdamWScheduleFree"]
        logs = f"--logging_dir={tmp_path / f'{name} logs'}"
        return sdxl_train.main([*argv, "--validate_every_n_steps=1", "--learning_rate=1e-3", logs, *flags])

    assert run("at once") == 0
    after_step = Tracker.after_step

    def stop(tracker: Tracker, occasion, report) -> None:
        after_step(tracker, occasion, report)
        if occasion.step == 1:
            (tmp_path / "stopped").mkdir(exist_ok=True)
            (tmp_path / "stopped" / STOP_FILE).touch()

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "after_step", stop)
        assert run("stopped") == 0
    assert run("stopped", "--resume=latest") == 0
    expected = outcome_of(tmp_path / "at once", tmp_path / "at once logs")
    assert len(expected["curve validation/loss"]) == 2
    found = outcome_of(tmp_path / "stopped", tmp_path / "stopped logs")
    assert differences(expected, {name: each for name, each in found.items() if "step00000001" not in name}) == []

    # Of the images that are measured one has changed since.
    entries = json.loads(prepared_set.latents_json.read_text(encoding="utf-8"))
    entries["chelsea"]["captionL"] = "another"
    (tmp_path / "changed.json").write_text(json.dumps(entries), encoding="utf-8")
    changed = f"--in_json={tmp_path / 'changed.json'}"
    shutil.copytree(tmp_path / "stopped", tmp_path / "again")
    assert run("again", changed, "--resume=latest") == 2
    assert "of the validation set, 1 images with another image, bucket, caption" in capsys.readouterr().err


def test_only_a_validation_set_that_has_changed_is_refused():
    with pytest.raises(UserError, match="of the validation set, 1 images removed: b"):
        check_validation({"a": "1", "b": "2"}, {"a": "1"}, anyway=False)
    assert check_validation({"a": "1"}, {"a": "2"}, anyway=True) != []
    assert check_validation({}, {"a": "2"}, anyway=False) == []  # there was none


# -- what is measured, without a run ----------------------------------------------------------------------------------

IMAGES = [
    image_of(key, caption_l, caption_g, Size(64, 64), Size(64, height), Crop(0, 0, 0), subset=subset_of(batch_size=2))
    for key, caption_l, caption_g, height in (
        ("a", "ink", "a fox", 64),
        ("b", "ink", "a hen", 128),
        ("c", "oil", "a cow", 64),
        ("d", "ink", "a cat", 64),
        ("e", "ink", "a dog", 64),
    )
]


def test_batches_are_of_one_kind_and_the_first_ones_of_the_same_images():
    assert [batch.indices for batch in batches_of(IMAGES)] == [(0, 2), (1,), (3, 4)]
    assert [image.key for image in first_batches(IMAGES, 2)] == ["a", "b", "c"]
    assert [batch.indices for batch in batches_of(first_batches(IMAGES, 2))] == [(0, 2), (1,)]
    assert list(first_batches(IMAGES, None)) == IMAGES


def test_the_other_caption_is_the_next_one_that_differs():
    tokens = captioned(IMAGES)._captioning.tokens
    readings = readings_of(IMAGES, tokens, ablation=True)
    own = readings[BOTH]
    assert [own.index(next(each for each in own if each.text_l == other.text_l)) for other in readings["other_l"]] == [
        *(2, 2, 0, 2, 2)
    ]
    assert [own.index(next(each for each in own if each.text_g == other.text_g)) for other in readings["other_g"]] == [
        *(1, 2, 3, 4, 0)
    ]
    for condition, kept in (("other_l", "text_g"), ("without_l", "pooled"), ("without_pooled", "text_l")):
        assert [getattr(each, kept) for each in readings[condition]] == [getattr(each, kept) for each in own]
    assert readings["without_pooled"][0].text_g == own[0].text_g
    assert {each.text_l for each in readings["without_both"]} == {readings["without_l"][0].text_l}
    assert set(readings_of(IMAGES, tokens, ablation=False)) == {BOTH}
    alike = [image for image in IMAGES if image.captions.variants_l == ("ink",)]
    assert set(readings_of(alike, tokens, ablation=True)) == {BOTH, *ABLATIONS} - {"other_l"}


def test_noise_is_a_function_of_seed_key_and_timestep():
    made = validation.noise_of(0, "a", 50, (4, 8, 8))
    assert torch.equal(made, validation.noise_of(0, "a", 50, (4, 8, 8)))
    others = [validation.noise_of(*each, (4, 8, 8)) for each in ((1, "a", 50), (0, "b", 50), (0, "a", 150))]
    assert not any(torch.equal(made, other) for other in others)
    assert abs(float(made.std()) - 1) < 0.15
