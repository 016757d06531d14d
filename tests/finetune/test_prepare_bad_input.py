"""Bad pictures are listed while the rest is prepared (status 1); other mistakes stop the script (status 2)."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from finetune import prepare_buckets_latents
from library.config.options import problems_of

# Pictures that cannot be used


def test_pictures_that_cannot_be_used_are_listed_and_the_others_prepared(folder, capsys):
    whole = folder.add("good.png").read_bytes()
    bad = [
        folder.add("cut short.png", whole[: len(whole) // 2]),
        folder.add("empty.png", b""),
        folder.add("text.png", b"<html>not found</html>"),
    ]
    folder.captions_for("good", *(path.stem for path in bad))
    assert folder.prepare("--batch_size=2") == 1
    printed = capsys.readouterr().out
    assert "3 images could not be used:" in printed
    for path in bad:
        assert f"  '{path}' cannot be used: " in printed
    assert folder.caches() == ["good.npz"]
    assert folder.resolutions() == {"good": [64, 64], "cut short": None, "empty": None, "text": None}
    assert "1 images (0 had their latents)" in printed


def test_a_picture_too_small_for_a_bucket_is_named(folder, capsys):
    folder.add("good.png")
    small = folder.add("small.png", (100, 20))
    folder.captions_for("good", "small")
    assert folder.prepare("--bucket_no_upscale") == 1
    assert f"  '{small}': an image of 100x20 is too small or too narrow" in capsys.readouterr().out
    assert folder.caches() == ["good.npz"]


def test_what_overflows_in_half_precision_is_redone_and_named(folder, write_vae, capsys):
    def change(tensors):
        tensors["first_stage_model.quant_conv.weight"][0] *= 1000
        tensors["first_stage_model.quant_conv.bias"][0] = torch.finfo(torch.float16).max

    image = folder.add("a.png")
    folder.prepare_all("--mixed_precision=fp16", model=write_vae("overflowing", change))
    message = f"'{image}' gave NaN or Inf in the VAE's precision and was encoded in float32."
    assert message in capsys.readouterr().err
    assert folder.cached("a").latents.max() > torch.finfo(torch.float16).max


def test_what_is_not_a_number_even_so_is_listed_and_not_written(folder, write_vae, capsys):
    def change(tensors):
        name = "first_stage_model.quant_conv.weight"
        tensors[name] = torch.full(tensors[name].shape, 3e38)  # finite, as a file must be; the sums are not

    image = folder.add("a.png")
    folder.captions_for("a")
    assert folder.prepare(model=write_vae("damaged", change)) == 1
    assert f"'{image}': the VAE's output is NaN or Inf, in float32 too." in capsys.readouterr().out
    assert (folder.caches(), folder.resolutions()) == ([], {"a": None})


# What is refused


def assert_refused(folder, capsys, *messages, flags=(), may_encode=False, **options):
    before = folder.out_json.read_bytes() if folder.out_json.is_file() else None
    assert folder.prepare(*flags, **options) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    for message in ("error: ", *messages):
        assert message in printed
    assert (folder.out_json.read_bytes() if folder.out_json.is_file() else None) == before
    assert not list(folder.root.rglob("*.partial"))
    assert may_encode or folder.caches() == []


@pytest.fixture
def ready(folder):
    """A folder with nothing wrong in it, and an output of an earlier day."""
    folder.add("a.png")
    folder.captions_for("a")
    folder.out_json.write_bytes(b'{"precious": {}}')
    return folder


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--v2"], ["--v2: belongs to Stable Diffusion 2", "Leave it off"]),
        (["--max_resolution=large"], ["'large' is not a resolution"]),
        (["--bucket_reso_steps=60"], ["bucket_reso_steps must be positive multiples of 8"]),
        (["--batch_size=0", "--max_data_loader_n_workers=-1"], ["--batch_size is 0", "--max_data_loader_n_workers is"]),
        (["--mixed_precision=fp8"], ["mixed_precision"]),
        (["--max_resolutions=64"], ["unknown flag --max_resolutions", "--max_resolution"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_that_cannot_work_are_named(ready, capsys, flags, messages):
    assert_refused(ready, capsys, *messages, flags=flags)


def test_metadata_and_pictures_with_nothing_in_common_are_named(ready, capsys):
    ready.captions_for("other")
    message = f"no image of '{ready.images}' has an entry in '{ready.in_json}'"
    assert_refused(ready, capsys, message, "--full_path and --recursive")


def test_broken_and_missing_metadata_are_named(ready, capsys):
    ready.in_json.write_bytes(b'{"a": {},\n"b": }')
    assert_refused(ready, capsys, f"'{ready.in_json}' is not valid JSON: line 2")
    ready.in_json.unlink()
    assert_refused(ready, capsys, f"cannot read '{ready.in_json}'")


def test_pictures_of_one_key_or_one_cache_are_both_named(ready, capsys):
    images = [ready.images / "a.png", ready.add("a.webp")]
    assert_refused(ready, capsys, f"'{images[0]}' and '{images[1]}' have the same key 'a'")
    ready.captions_for(*images)
    message = f"'{images[0]}' and '{images[1]}' would share the latents file 'a.npz'"
    assert_refused(ready, capsys, message, flags=["--full_path"])


def test_an_output_that_cannot_be_written_is_named(ready, capsys):
    ready.out_json.unlink()
    ready.out_json.mkdir()
    assert_refused(ready, capsys, f"cannot write '{ready.out_json}'", may_encode=True)


def test_a_model_that_is_missing_damaged_or_no_sdxl_is_named(ready, capsys, tmp_path):
    missing = tmp_path / "no model.safetensors"
    assert_refused(ready, capsys, f"there is no file '{missing}'", model=missing)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(ready.model.read_bytes()[:1000])
    assert_refused(ready, capsys, f"'{damaged}' is not a whole safetensors file", model=damaged)
    other = tmp_path / "sd 1.safetensors"
    save_file({"cond_stage_model.transformer.x": torch.zeros(1)}, other)
    assert_refused(ready, capsys, f"'{other}' is not an SDXL checkpoint (it looks like Stable Diffusion 1", model=other)


def test_a_folder_without_pictures_is_named(ready, capsys):
    (ready.images / "a.png").unlink()
    assert_refused(ready, capsys, f"no images in '{ready.images}'")


def test_bad_numbers_of_batch_and_threads_are_named():
    problems = problems_of(prepare_buckets_latents.LatentOptions(batch_size=0, max_data_loader_n_workers=-1))
    assert [problem.split(" is ")[0] for problem in problems] == ["--batch_size", "--max_data_loader_n_workers"]
    no_threads = prepare_buckets_latents.LatentOptions(max_data_loader_n_workers=0)
    assert problems_of(no_threads) == []


def test_a_mask_that_cannot_be_used_is_listed(folder, capsys):
    (folder.root / "masks").mkdir()
    for name, size in (("a", (100, 60)), ("b", (60, 100)), ("c", (100, 60))):
        folder.add(f"{name}.png")
        Image.new("L", size, 0 if name == "c" else 255).save(folder.root / f"masks/{name}.png")
    folder.captions_for("a", "b", "c")
    flag = f"--conditioning_data_dir={folder.root / 'masks'}"
    assert folder.prepare(flag) == 1
    told = capsys.readouterr().out
    assert "2 images could not be used:" in told
    assert "the mask is 60x100, its image 100x60" in told
    assert "c.png' is black wherever it would be trained" in told
    assert folder.cached("a").alpha_mask.min() == 1
    (folder.root / "masks/b.png").unlink()
    assert folder.prepare(flag) == 2
    assert "1 images of '" in (told := capsys.readouterr().err) and "have no mask in" in told


def test_masks_that_have_changed_are_written_again(folder):
    (folder.root / "masks").mkdir()
    folder.add("a.png")
    Image.new("L", (100, 60), 255).save(folder.root / "masks/a.png")
    flags = (f"--conditioning_data_dir={folder.root / 'masks'}", "--skip_existing")
    folder.prepare_all(*flags)
    before = folder.cached("a")
    Image.new("L", (100, 60), 51).save(folder.root / "masks/a.png")
    folder.prepare_all(*flags)
    assert (before.alpha_mask[0, 0], round(float(folder.cached("a").alpha_mask[0, 0]), 6)) == (1, 0.2)
