"""The preparation script on real photographs and odd files: what is written, and where."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn.datasets
from PIL import ExifTags, Image

from finetune import prepare_buckets_latents as script
from library.config.options import parse_options
from library.data.latent_cache import cache_path, read_cache
from library.data.latent_entries import state_of
from library.data.latent_index import index_beside, read_index, settled
from library.images.buckets import parse_resolution
from library.sdxl.sizes import Size

GOLDEN = Path(__file__).parents[1] / "golden"
SIZE = Size(100, 60)
GOLDEN_BUCKETS = ("--max_resolution=256,256", "--min_bucket_reso=128", "--max_bucket_reso=512")
SEEDS_COMMAND = (
    *("--batch_size", "1", "--max_resolution=1024,1024", "--min_bucket_reso=1024", "--max_bucket_reso=2048"),
    "--mixed_precision=bf16",
)


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def noise_picture(size, name):
    """A picture of noise, another one for each name."""
    pixels = np.random.default_rng(list(name.encode())).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def photographs():
    """The photographs of the golden files, by their names there."""
    china, flower = sklearn.datasets.load_sample_images().images
    data = skimage.data
    return {
        "01_astronaut": data.astronaut(),
        "02_cat": data.chelsea(),
        "03_coffee": data.coffee(),
        "04_rocket": data.rocket(),
        "05_china": china,
        "06_flower": flower,
    }


# Real photographs, beside the reference


@pytest.mark.parametrize(
    ("recorded", "flags"),
    [
        ("mio_prepare_256_min128_max512_bf16", ["--mixed_precision=bf16"]),
        ("mio_prepare_256_flip_aug_batch4", ["--flip_aug", "--batch_size=4"]),
    ],
)
def test_photographs_get_the_sizes_crops_and_arrays_of_the_reference(folder, tiny_sdxl, recorded, flags):
    for name, pixels in photographs().items():
        folder.add(f"{name}.jpg", Image.fromarray(pixels))
    folder.prepare_all("--legacy_crop_coords", *flags, buckets=GOLDEN_BUCKETS, model=tiny_sdxl)
    for entry in golden("latent_cache.json")[recorded]:
        with np.load(folder.images / entry["npz"], allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in entry["keys"]}
        assert arrays.keys() == entry["keys"].keys()
        for name, facts in entry["keys"].items():
            assert (arrays[name].dtype.name, list(arrays[name].shape)) == (facts["dtype"], facts["shape"])
            np.testing.assert_array_equal(arrays[name], facts.get("value", arrays[name]))
        _, height, width = entry["keys"]["latents"]["shape"]
        assert folder.resolutions()[Path(entry["npz"]).stem] == [width * 8, height * 8]


def test_the_seeds_command_chooses_the_buckets_of_the_reference():
    arguments = ["images", "in.json", "out.json", "model.safetensors", *SEEDS_COMMAND]
    options, _, buckets = parse_options(script.OPTION_CLASSES, arguments, description="")
    rule = buckets.rule(parse_resolution(options.max_resolution))
    pictures = photographs() | {
        "07_hubble": skimage.data.hubble_deep_field(),
        "09_cameraman": skimage.data.camera(),
        "10_retina": skimage.data.retina(),
    }
    expected = golden("meta_lat_1024_seed_command.json")
    for name, pixels in pictures.items():
        assert list(rule.assign(Size(pixels.shape[1], pixels.shape[0])).bucket) == expected[name]["train_resolution"]


def test_the_seeds_command_runs_as_written_on_a_photograph(folder, tiny_sdxl, capsys):
    metadata = golden("meta_lat_1024_seed_command.json")
    folder.add("02_cat.jpg", Image.fromarray(skimage.data.chelsea()))
    folder.captions_for(**{"02_cat": {key: metadata["02_cat"][key] for key in ("captionG", "captionL")}})
    assert folder.prepare(buckets=SEEDS_COMMAND, model=tiny_sdxl) == 0
    assert json.loads(folder.out_json.read_text(encoding="utf-8")) == {"02_cat": metadata["02_cat"]}
    cached = folder.cached("02_cat")
    assert (cached.bucket, cached.original_size, cached.resized_size) == ((1216, 832), (451, 300), (1251, 832))
    assert cached.crop_ltrb == (17, 0, 1233, 832)
    assert "image/s]" in capsys.readouterr().err


# Pictures of every kind


def alpha_picture(size=SIZE):
    image = noise_picture(size, "alpha")
    image.putalpha(Image.linear_gradient("L").resize(size).point(lambda row: 255 * (row > 99)))
    white = Image.new("RGBA", image.size, "white")
    return image, Image.alpha_composite(white, image).convert("RGB")


def pictures_of_every_mode():
    """A picture by file name, and what it is in RGB."""
    grey, cmyk = noise_picture(SIZE, "grey").convert("L"), noise_picture(SIZE, "cmyk").convert("CMYK")
    palette = noise_picture(SIZE, "palette").quantize(16)
    return {
        "alpha.png": alpha_picture(),
        "palette.png": (palette, palette.convert("RGB")),
        "grey.png": (grey, grey.convert("RGB")),
        "cmyk.tif": (cmyk, cmyk.convert("RGB")),
        "sixteen bits.png": (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), grey.convert("RGB")),
    }


def test_pictures_of_every_kind_have_the_latents_of_the_same_picture_in_rgb(folder):
    pictures = pictures_of_every_mode()
    for name, (picture, in_rgb) in pictures.items():
        folder.add(name, picture)
        folder.add(f"{Path(name).stem} in rgb.png", in_rgb)
    on_its_side = noise_picture(SIZE, "turned")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    folder.add("turned.png", on_its_side, exif=exif)
    folder.add("turned in rgb.png", on_its_side.transpose(Image.Transpose.ROTATE_270))
    frames = [noise_picture(SIZE, name).quantize(16) for name in "ab"]
    folder.add("moving.gif", frames[0], save_all=True, append_images=frames[1:])
    folder.add("moving in rgb.png", frames[0].convert("RGB"))
    folder.prepare_all()
    for name in [*(Path(name).stem for name in pictures), "turned", "moving"]:
        ours, in_rgb = folder.cached(name), folder.cached(f"{name} in rgb")
        np.testing.assert_array_equal(ours.latents, in_rgb.latents, err_msg=name)
        assert (ours.original_size, ours.crop_ltrb) == (in_rgb.original_size, in_rgb.crop_ltrb)
    assert folder.cached("turned").original_size == (60, 100)


# What is written


def test_the_metadata_is_kept_with_the_bucket_added_and_the_table_counts(folder, capsys):
    for name, size in {"wide": Size(200, 50), "wide too": Size(150, 40), "tall": Size(60, 80)}.items():
        folder.add(f"{name}.png", size)
    extra = {"captionG": "g ü", "score": 1, "train_resolution": [8, 8]}
    folder.captions_for("wide", "wide too", tall=extra)
    assert folder.prepare() == 0
    written = json.loads(folder.out_json.read_text(encoding="utf-8"))
    assert written["tall"] == extra | {"train_resolution": [64, 64]}
    assert folder.resolutions() == {"wide": [128, 32], "wide too": [128, 32], "tall": [64, 64]}
    assert capsys.readouterr().out.splitlines() == [
        f"wrote 3 entries, 3 of them with latents, to '{folder.out_json}'",
        "buckets:",
        "  bucket       images",
        "  64x64             1",
        "  128x32            2",
        "3 images (0 had their latents); about 10 % of each image is cropped away;"
        " most: 'tall.png' 25 %, 'wide too.png' 6 %",
    ]


def test_the_true_crop_is_recorded(folder):
    folder.add("a.png", SIZE)
    folder.prepare_all()
    cached = folder.cached("a")
    assert (cached.bucket, cached.resized_size, cached.crop_ltrb) == ((64, 64), (107, 64), (21, 0, 85, 64))


def test_flip_and_mask_are_written_when_asked_for(folder):
    picture, _ = alpha_picture(Size(108, 64))  # the crop takes 22 columns on each side
    folder.add("a.png", picture)
    folder.add("mirrored.png", picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    folder.prepare_all()
    assert (folder.cached("a").latents_flipped, folder.cached("a").alpha_mask) == (None, None)
    folder.prepare_all("--flip_aug", "--alpha_mask")
    cached, mirrored = folder.cached("a"), folder.cached("mirrored")
    assert cached.alpha_mask.shape == (8, 8)  # at the size of the latents
    np.testing.assert_array_equal(cached.alpha_mask, mirrored.alpha_mask)  # its alpha is the same in every column
    np.testing.assert_array_equal(cached.latents_flipped, mirrored.latents)
    np.testing.assert_array_equal(cached.latents, mirrored.latents_flipped)


def test_no_upscale_keeps_small_pictures_as_they_are(folder):
    folder.add("a.png", Size(75, 41))
    folder.prepare_all("--bucket_no_upscale")
    cached = folder.cached("a")
    assert (cached.bucket, cached.resized_size, cached.crop_ltrb) == ((64, 32), (75, 41), (5, 4, 69, 36))


def test_batches_and_threads_change_nothing(folder):
    for index in range(5):
        folder.add(f"{index}.png", Size(100, 60 + index))
    folder.prepare_all()
    one_by_one = [folder.cached(index).latents for index in range(5)]
    folder.prepare_all("--batch_size=3", "--max_data_loader_n_workers=2")
    for index, latents in enumerate(one_by_one):
        # Sums of another order in a larger batch: float32 rounding, 1e-7 of values about 1, over some 30 layers.
        np.testing.assert_allclose(folder.cached(index).latents, latents, rtol=0, atol=2e-5)


def test_subfolders_and_paths_as_keys_on_request(folder):
    images = [folder.add("a.png"), folder.add("deep/a.png")]
    folder.captions_for(*images)
    assert folder.prepare("--recursive", "--full_path") == 0
    assert set(folder.resolutions()) == {str(image) for image in images}
    assert folder.caches() == ["a.npz", "deep/a.npz"]


def test_what_has_no_counterpart_is_listed(folder, capsys):
    for name in ("a.png", "b.png", "lonely.png"):
        folder.add(name)
    folder.captions_for("a", "b", "gone", "gone too")
    assert folder.prepare() == 0
    printed = capsys.readouterr().out
    assert f"1 images without metadata are left out:\n  {folder.images / 'lonely.png'}\n" in printed
    stay = "2 entries of the metadata without an image stay as they are (see --remove_missing):"
    assert f"{stay}\n  gone\n  gone too\n" in printed
    assert folder.caches() == ["a.npz", "b.npz"]
    assert folder.resolutions() == {"a": [64, 64], "b": [64, 64], "gone": None, "gone too": None}


def test_entries_without_an_image_are_removed_on_request(folder, capsys):
    folder.add("a.png")
    folder.captions_for("a", *(f"gone {number:02}" for number in range(12)))
    assert folder.prepare("--remove_missing") == 0
    printed = capsys.readouterr().out
    assert "12 entries without an image are removed:\n  gone 00\n" in printed
    assert "gone 09\n  and 2 more\n" in printed
    assert folder.resolutions() == {"a": [64, 64]}


def test_keys_that_are_paths_of_another_place_are_found_by_name(folder, capsys):
    for name in ("a.png", "deep/b.png", "deep/c.png"):
        folder.add(name)
    folder.captions_for("/old/my set/a.png", "C:\\old\\deep\\b.png", str(folder.images / "deep" / "c.png"))
    assert folder.prepare("--recursive", "--full_path") == 0
    assert "2 keys are paths of another place; their images were found by name" in capsys.readouterr().out
    assert list(folder.resolutions().values()) == [[64, 64]] * 3
    assert folder.caches() == ["a.npz", "deep/b.npz", "deep/c.npz"]


def test_two_keys_of_another_place_do_not_share_an_image(folder, capsys):
    folder.add("a.png")
    folder.captions_for("/old/x/a.png", "/old/y/a.png")
    assert folder.prepare("--full_path") == 2
    assert "several keys of the metadata lead to one image" in capsys.readouterr().err
    assert folder.caches() == []


def test_the_cache_lies_beside_the_picture_under_its_stem(folder):
    image = folder.add("01.v2.PNG")
    folder.prepare_all()
    assert folder.caches() == [cache_path(image).name] == ["01.v2.npz"]


def test_jsonl_does_not_lead_to_images_elsewhere(folder, capsys):
    folder.add("01.png")
    elsewhere = folder.add("../elsewhere/03.png").resolve()
    in_json = folder.root / "meta.jsonl"
    lines = [{"image_path": path, "captionG": "a", "captionL": "b"} for path in ("01.png", str(elsewhere))]
    in_json.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    arguments = [folder.images, in_json, folder.out_json, folder.model]
    assert script.main([str(argument) for argument in arguments]) == 2
    assert "outside the image folder" in capsys.readouterr().err
    assert not list(folder.root.rglob("*.npz"))


def test_jsonl_leads_to_its_images_and_json_is_written(folder, capsys):
    folder.add("01.png")
    folder.add("deep/01.png")
    folder.add("deep/03.png")
    folder.add("unlisted.png")
    lines = [
        {"image_path": "01.png", "caption": "a", "tags": "b"},
        {"image_path": "deep\\01.png", "caption": "a", "tags": "b"},
        {"image_path": str(folder.images / "deep" / "03.png"), "captionG": "a", "captionL": "b"},
        {"image_path": "gone.png", "caption": "a"},
    ]
    written = json.loads(folder.prepare_lines(lines))
    bucket = {"train_resolution": [64, 64]}
    assert written == {
        "01.png": {"caption": "a", "tags": "b"} | bucket,
        "deep\\01.png": {"caption": "a", "tags": "b"} | bucket,
        str(folder.images / "deep" / "03.png"): {"captionG": "a", "captionL": "b"} | bucket,
        "gone.png": {"caption": "a"},
    }
    assert folder.caches() == ["01.npz", "deep/01.npz", "deep/03.npz"]
    said = capsys.readouterr().out
    assert f"1 images without metadata are left out:\n  {folder.images / 'unlisted.png'}" in said
    assert "1 entries of the metadata without an image stay as they are (see --remove_missing):\n  gone.png" in said


def test_jsonl_is_written_where_the_name_says_so(folder):
    folder.add("01.png")
    written = folder.prepare_lines([{"image_path": "01.png", "tags": "b"}], out="meta lat.jsonl")
    assert written == '{"image_path": "01.png", "tags": "b", "train_resolution": [64, 64]}\n'


@pytest.mark.parametrize("again", [False, True])
def test_the_index_knows_all_that_was_written_or_kept(folder, again):
    for name in "abc":
        path = folder.add(f"{name}.png")
        os.utime(path, (1_700_000_000.5, 1_700_000_000.5))
    folder.prepare_all()
    if again:
        shutil.rmtree(index_beside(folder.out_json))
        os.utime(folder.images / "a.npz", (1_700_000_000.5, 1_700_000_000.5))
        assert folder.prepare("--skip_existing") == 0
    index = read_index(index_beside(folder.out_json))
    assert list(index.names) == ["a.npz", "b.npz", "c.npz"]
    # Those that were only read may have been written again in the same moment.
    assert settled(index.entries).tolist() == [True, not again, not again]
    for name, entry in zip(index.names, index.entries, strict=True):
        assert state_of(folder.images / name) == entry["place"]["state"].item()
        assert read_cache(folder.images / name).image_digest == entry["content"].decode()
