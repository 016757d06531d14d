"""The dry run: it shows what training would read, writes nothing else, and its page holds whatever captions say."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

import sdxl_train
from library.captions.options import CaptionOptions, resolve
from library.data.epoch_order import BatchShape, EpochOrder
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketOptions
from library.sdxl.sizes import Size
from library.sdxl.tokenizers import END_TOKEN, token_ids
from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags, forget_accelerator
from tests.training_images import captioned, read_set, with_rules

DROPPED = ("--caption_dropout_rate_l=0.25",)
HOSTILE = "</span><script>document.title = 'run'</script> & \"quotes\" \x1b[31m and half \ud83d of a pair"
RULES = ("--shuffle_caption_l", "--caption_dropout_rate=0.3", "--caption_tag_dropout_rate_l=0.2", "--flip_aug")


@pytest.fixture
def dry(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path, capsys):
    """`dry("--flag=value", ...)` returns exit status, standard output and standard error of a dry run."""

    def run(*flags: str) -> tuple[int, str, str]:
        argv = [
            *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, tmp_path / "output"),
            *("--resolution=128,128", "--seed=7", *BUCKET_FLAGS, *flags),
        ]
        forget_accelerator()
        status = sdxl_train.main(argv)
        return status, *capsys.readouterr()

    return run


def report(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_image_of_the_report_has_the_texts_that_training_reads(
    dry, prepared_set: PreparedSet, tmp_path: Path, monkeypatch
):
    fresh = prepared_set.without_latents(tmp_path / "set")
    sources = [f"--in_json={fresh.captions_json}", f"--train_data_dir={fresh.images}", "--enable_bucket"]
    path = tmp_path / "dry.jsonl"
    status, _, _ = dry(*sources, *RULES, "--dry_run=1", f"--dry_run_report={path}", "--max_train_steps=7")
    assert status == 0
    options = CaptionOptions(shuffle_caption_l=True, caption_dropout_rate=0.3, caption_tag_dropout_rate_l=0.2)
    buckets = BucketOptions(min_bucket_reso=64, max_bucket_reso=256, bucket_reso_steps=64)
    training_set = TrainingSetOptions(fresh.images, fresh.captions_json, enable_bucket=True, flip_aug=True)
    images = read_set(training_set, buckets.rule(Size(128, 128)), "vae")
    dataset = captioned(with_rules(images, resolve([vars(options)])), seed=7, num_steps=7)
    order = EpochOrder([image.kind for image in images], BatchShape(), seed=7, flip=True)
    trained = {}
    for epoch in range(3):
        order.start_at(epoch, steps_done=3 * epoch)
        for micro_batch in order:
            batch = dataset[micro_batch]
            trained[batch.keys[0], epoch + 1] = (
                [[int(each) for each in ids[0, 0, 1:] if each not in (END_TOKEN, 0)] for ids in batch.tokens],
                micro_batch.flips[0],
            )
    shown = report(path)
    assert {each["key"] for each in shown} == {image.key for image in images}
    for each in shown:
        for visit in each["visits"]:
            read = [token_ids(visit[name]["text"]) for name in ("caption_l", "caption_g")]
            assert (read, visit["is_flipped"]) == trained[each["key"], visit["epoch"]]
    assert any(visit["caption_l"]["is_dropped"] for each in shown for visit in each["visits"])


def test_it_says_sizes_latents_caches_and_totals_and_writes_nothing(dry, tmp_path: Path):
    status, said, _ = dry(
        "--dry_run", "--cache_text_encoder_outputs", "--max_train_steps=6", "--caption_dropout_rate_l=0.25"
    )
    assert status == 0
    assert "crop at " in said
    assert "latents fit" in said
    assert "cached at the start" in said
    assert "3 images in 3 batches, 3 steps per epoch, 6 steps in 2 epochs, seed 7" in said
    assert re.search(r"L: 3 different captions, 4 texts, cached, 0 empty", said)  # with the empty one of dropout
    assert "  L dropped        25.00 %      0.00 %" in said
    assert not (tmp_path / "output").exists()


def test_stale_and_missing_latents_are_told_apart(dry, prepared_set: PreparedSet, tmp_path: Path):
    copied = tmp_path / "set"
    shutil.copytree(prepared_set.images, copied)
    stale, missing, _ = sorted(copied.glob("*.npz"))
    missing.unlink()
    (image,) = (path for path in copied.glob(f"{stale.stem}.*") if path.suffix in (".jpg", ".png"))
    with Image.open(image) as picture:
        picture.rotate(180).save(image)
    status, said, _ = dry(f"--train_data_dir={copied}", "--dry_run")
    assert status == 0
    assert re.search(rf"{stale.stem}: .*latents are stale: ", said)
    assert re.search(rf"{missing.stem}: .*latents are missing", said)


def test_it_ends_with_the_errors_of_training(dry, tmp_path: Path):
    status, _, said = dry("--dry_run", f"--train_data_dir={tmp_path}")
    assert status == 2
    assert said.startswith("error: ")
    assert dry("--dry_run_report=x.html")[0] == 2
    assert "its name must end in .html or .jsonl" in dry("--dry_run", "--dry_run_report=x.txt")[2]
    metadata = tmp_path / "meta.jsonl"
    metadata.write_text('{"image_path": "01.jpg"}\n', encoding="utf-8")
    assert "is not overwritten" in dry("--dry_run", f"--dry_run_report={metadata}")[2]
    assert metadata.read_text(encoding="utf-8") == '{"image_path": "01.jpg"}\n'
    assert "--flow_shift belongs to flows" in dry("--dry_run", "--flow_shift=2")[2]
    assert "holds no complete state" in dry("--dry_run", "--resume=latest")[2]


@pytest.mark.parametrize("flag", ["--plot_schedule=rates.png", "--update_captions"])
def test_what_it_would_not_do_is_refused(dry, flag: str):
    status, _, said = dry("--dry_run", flag)
    assert (status, f"it excludes {flag.partition('=')[0]}" in said) == (2, True)


@pytest.fixture
def hostile_page(dry, prepared_set: PreparedSet, tmp_path: Path) -> Path:
    entries = json.loads(prepared_set.latents_json.read_text(encoding="utf-8"))
    for entry in entries.values():
        entry["captionL"], entry["captionG"] = HOSTILE, "word " * 90 + "end"
    metadata = tmp_path / "meta.json"
    metadata.write_text(json.dumps(entries), encoding="utf-8")
    page = tmp_path / "dry.html"
    assert dry(f"--in_json={metadata}", "--dry_run", f"--dry_run_report={page}")[0] == 0
    return page


def test_the_page_needs_nothing_else_and_escapes_what_files_say(hostile_page: Path):
    page = hostile_page.read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert page.count('src="data:image/jpeg;base64,') == 3
    assert "<del>" in page


@pytest.mark.heavy
def test_a_browser_shows_the_page(hostile_page: Path, browsed):
    shown = browsed(hostile_page)
    assert "<title>Dry run</title>" in shown  # which a script of a caption would have changed
    assert shown.count('class="card image"') == 3
    assert shown.count("<del>") == 9  # three images in three epochs


def test_latents_that_training_would_make_again_are_not_said_to_fit(dry):
    _, said, _ = dry("--dry_run", "--resize_interpolation=nearest")
    assert said.count("latents are stale: ") == 3
    _, said, _ = dry("--dry_run", "--random_crop")
    assert said.count("latents have no use: pixels change at every visit") == 3
