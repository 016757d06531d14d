"""Data set files: every value against the reference, what is refused, and captions beside the images."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library.captions.options import CaptionOptions
from library.config.errors import UserError
from library.data.dataset_config import read_dataset_config, require_masks
from library.data.loader_options import LoaderOptions
from library.data.regularization import balanced_repeats, repeats_of
from library.data.subsets import Subset, described_subsets
from library.data.training_set import find_training_images
from library.data.training_set_options import TrainingSetOptions
from library.images.buckets import BucketOptions
from library.sdxl.sizes import Size

CASES = json.loads((Path(__file__).parents[1] / "golden" / "dataset_config.json").read_text(encoding="utf-8"))["cases"]
NOT_OFFERED = {  # the key that this program refuses, or what is missing, in files that the reference reads
    "general_only": r"there are no \[\[datasets\]\]",
}
READ_HERE = {"mixed_subsets"}  # refused there; metadata and caption files may be mixed here


def read(text: str, folder: Path, *, name: str = "sets.toml", **flags: Any) -> list[Subset]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    classes = (TrainingSetOptions, LoaderOptions, CaptionOptions, BucketOptions)
    options = [each(**{key: value for key, value in flags.items() if hasattr(each, key)}) for each in classes]
    return read_dataset_config(path, *options)


def make_folders(case: dict[str, Any]) -> None:
    for dataset in case.get("datasets", []):
        for subset in dataset["subsets"]:
            if subset.get("image_dir"):
                Path(subset["image_dir"]).mkdir(parents=True, exist_ok=True)
            if subset.get("metadata_file"):
                Path(subset["metadata_file"]).write_text("{}")
    Path("a").mkdir(exist_ok=True)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


ACCEPTED = [c for c in CASES if "error" not in c and c["name"] not in NOT_OFFERED]


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case["name"])
def test_every_value_is_that_of_the_reference(case: dict[str, Any], in_folder: Path):
    make_folders(case)
    said = [flag.lstrip("-").partition("=") for flag in case["flags"]]
    flags = {
        key: True if not is_set else int(text) if "_n_" in key or "repeats" in key else text
        for key, is_set, text in said
    }
    subsets = iter(read(case["toml"], in_folder, **flags))
    for number, dataset in enumerate(case["datasets"]):
        params = dataset["params"]
        for expected in dataset["subsets"]:
            subset = next(subsets)
            assert (subset.dataset, subset.batch_size) == (number, params["batch_size"])
            rule = subset.rule
            assert rule.max_resolution == Size(*params["resolution"])
            if params["enable_bucket"]:
                assert (rule.min_bucket_reso, rule.max_bucket_reso, rule.bucket_reso_steps, rule.no_upscale) == tuple(
                    params[f"{name}"]
                    for name in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
                )
            assert rule.enabled == params["enable_bucket"]
            assert subset.num_repeats == expected["num_repeats"]
            assert subset.is_reg == expected.get("is_reg", False)
            assert subset.class_tokens == expected.get("class_tokens")
            assert subset.alpha_mask == expected.get("alpha_mask", False)
            augmentation = subset.augmentation
            for key in ("flip_aug", "color_aug", "random_crop", "resize_interpolation"):
                assert getattr(augmentation, key) == expected[key]
            face_range = expected["face_crop_aug_range"]
            assert augmentation.face_crop_aug_range == (None if face_range is None else tuple(face_range))
            if expected.get("image_dir"):
                assert subset.image_dir == Path(expected["image_dir"])
            if expected.get("caption_extension", ".caption") != ".caption":
                assert subset.extension_l == subset.extension_g == expected["caption_extension"]
            for rules in (subset.captions.rules_l, subset.captions.rules_g):
                assert rules.shuffle_caption == expected["shuffle_caption"]
                assert rules.keep_tokens == expected["keep_tokens"]
                assert rules.enable_wildcard == expected["enable_wildcard"]
                assert (rules.caption_prefix or None) == expected["caption_prefix"]
                assert (rules.caption_suffix or None) == expected["caption_suffix"]
                assert rules.caption_separator == expected["caption_separator"]
                assert rules.caption_tag_dropout_rate == expected["caption_tag_dropout_rate"]
                assert rules.token_warmup_step == expected["token_warmup_step"]
            assert subset.captions.dropout.caption_dropout_rate == expected["caption_dropout_rate"]
    assert next(subsets, None) is None


REFUSED = [c for c in CASES if "error" in c and c["name"] not in READ_HERE]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["name"])
def test_what_the_reference_refuses_is_refused_by_the_same_keys(case: dict[str, Any], in_folder: Path):
    make_folders(case)
    with pytest.raises(UserError) as raised:
        read(case["toml"], in_folder)
    for each in case.get("errors", []):
        name = next((part for part in reversed(each["path"]) if not part.isdecimal()), "")
        assert name in str(raised.value)


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_what_is_not_offered_is_refused(name: str, in_folder: Path):
    [case] = [case for case in CASES if case["name"] == name]
    make_folders(case)
    with pytest.raises(UserError, match=NOT_OFFERED[name]):
        read(case["toml"], in_folder)


def toml(subset: str = "", dataset: str = "", general: str = "") -> str:
    return f'[general]\n{general}\n[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = "a"\n{subset}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (toml("shufle_caption = true"), "line 7: .* no key 'shufle_caption'. Did you mean shuffle_caption"),
        (toml("batch_size = 2"), "line 7: .* no key 'batch_size'; it belongs to .general. or ..datasets.."),
        (toml("caption_dropout_rate_l = 1.5"), "line 7: caption_dropout_rate_l is 1.5; it must be 1 or less"),
        (toml("caption_dropout_rate_l = 0.7", general="caption_dropout_rate = 0.5"), "add up to 1.2"),
        (toml('protected_tags = "none.txt"'), "cannot read 'none.txt'"),
        (toml('[[datasets.subsets]]\nimage_dir = "a"'), "names '.*' 2 times"),
        (toml('[[datasets.subsets]]\nimage_dir = "b"'), "there is no folder 'b'"),
        (toml("is_reg = true"), "regularization images only"),
        (toml('conditioning_data_dir = "a"'), "conditioning_data_dir has no effect without --masked_loss"),
        ("[[datasets]]\nresolution = 64\n", "has no ..datasets.subsets.."),
        ("[general\n", "cannot be read"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, message: str, in_folder: Path):
    (in_folder / "a").mkdir()
    with pytest.raises(UserError, match=message):
        read(text, in_folder)


def test_the_nearest_level_decides_for_each_encoder(in_folder: Path):
    (in_folder / "a").mkdir()
    [subset] = read(toml("shuffle_caption_l = true", "shuffle_caption = false\nkeep_tokens_g = 2"), in_folder)
    assert subset.captions.rules_l.shuffle_caption and not subset.captions.rules_g.shuffle_caption
    assert (subset.captions.rules_l.keep_tokens, subset.captions.rules_g.keep_tokens) == (0, 2)


def test_a_key_that_json_has_twice_is_refused_as_in_toml(in_folder: Path):
    with pytest.raises(UserError, match="the key 'flip_aug' occurs twice in one object"):
        read('{"general": {"flip_aug": true, "flip_aug": false}}', in_folder, name="sets.json")


def test_one_caption_is_refused_where_captions_are_files(in_folder: Path):
    (in_folder / "a").mkdir()
    (in_folder / "meta.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"--one_caption needs a metadata_file in every subset"):
        read(toml(), in_folder, one_caption=True)
    assert read(toml('metadata_file = "meta.json"'), in_folder, one_caption=True)[0].one_caption


def test_json_says_the_same_and_a_folder_is_found_beside_the_file(tmp_path: Path):
    (tmp_path / "a").mkdir()
    text = json.dumps({"datasets": [{"resolution": 512, "subsets": [{"image_dir": "a", "num_repeats": 2}]}]})
    [of_json] = read(text, tmp_path, name="sets.json")
    assert of_json.image_dir == tmp_path / "a"
    assert [of_json] == read(toml("num_repeats = 2", "resolution = 512"), tmp_path)


def test_a_run_is_compared_by_what_the_file_resolves_to(in_folder: Path):
    (in_folder / "a").mkdir()
    described = [
        described_subsets(read(text, in_folder)) for text in (toml("num_repeats = 2"), toml(general="num_repeats = 2"))
    ]
    assert described[0] == described[1]
    assert described[0] != described_subsets(read(toml("num_repeats = 3"), in_folder))


def images(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 64)).save(folder / name)


def test_captions_are_read_beside_the_images(in_folder: Path):
    images(in_folder / "a", "one.png", "two_10_10_8_8.png")
    (in_folder / "a" / "one.txt").write_text(" style \n")
    (in_folder / "a" / "two.caption").write_text("a face\nsomebody")
    found = find_training_images(read(toml('class_tokens = "man"'), in_folder))
    assert [tuple(image.captions) for image in found] == [
        (("style",), ("man",)),
        (("man",), ("a face", "somebody")),
    ]


def test_images_without_captions_are_named(in_folder: Path):
    images(in_folder / "a", *[f"{number:02}.png" for number in range(12)])
    images(in_folder / "b", "x.png", "y.png")
    (in_folder / "b" / "x.txt").write_text("style")
    with pytest.raises(UserError) as raised:
        find_training_images(read(toml('[[datasets.subsets]]\nimage_dir = "b"'), in_folder))
    of_a, of_b = str(raised.value).split("\n")[1:]
    assert "12 of 12 images of 'a' have no .txt file, which is the caption of L: '00.png', '01.png'" in of_a
    assert "'09.png' and 2 more; 12 of 12 images of 'a' have no .caption file, which is the caption of G: " in of_a
    assert "1 of 2 images of 'b' have no .txt file, which is the caption of L: 'y.png'; 2 of 2 images of 'b'" in of_b


def test_a_folder_without_images_is_named_and_no_flag_that_the_trainer_lacks(in_folder: Path):
    images(in_folder / "a")
    with pytest.raises(UserError, match=r"no images in 'a': it holds no file .* Give the folder of the images\.$"):
        find_training_images(read(toml(), in_folder))


def keys_of(text: str, in_folder: Path) -> list[str]:
    return [image.key for image in find_training_images(read(text, in_folder))]


def test_the_key_of_an_image_stays_the_same_whatever_subsets_are_added(in_folder: Path):
    for name in ("a", "b"):
        images(in_folder / name, "one.png")
    at_64 = toml('class_tokens = "x"', "resolution = 64")
    at_128 = at_64.replace("64", "128").partition("\n\n")[2]
    with_b = at_64.replace("image_dir", 'image_dir = "b"\nclass_tokens = "y"\n[[datasets.subsets]]\nimage_dir')
    assert keys_of(at_64, in_folder) == ["64x64 a/one"]
    assert keys_of(with_b, in_folder) == ["64x64 b/one", "64x64 a/one"]
    assert keys_of(with_b + at_128, in_folder) == ["64x64 b/one", "64x64 a/one", "128x128 a/one"]
    assert keys_of(toml('class_tokens = "x"', general="resolution = 1024"), in_folder) == ["a/one"]
    assert all(subset.names_bucket for subset in read(at_64 + at_128, in_folder))


def test_images_of_a_folder_that_two_data_sets_take_have_different_keys_whatever_they_are_called(in_folder: Path):
    images(in_folder / "a", "01.png", "01 (2).png", "01 (3).png")
    twice = toml('class_tokens = "x"') + '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nclass_tokens = "y"\n'
    keys = keys_of(twice, in_folder)
    assert len(set(keys)) == len(keys) == 6
    assert {"a/01", "a/01 (2)", "a/01 (3)"} < set(keys)


def test_latents_of_a_subset_whose_pixels_change_are_not_cached_and_that_is_told(in_folder: Path, capsys):
    for name in ("a", "b"):
        images(in_folder / name, "one.png")
    text = toml('[[datasets.subsets]]\nimage_dir = "b"\ncolor_aug = true')
    read(text, in_folder, cache_latents=True)
    assert "images of 'b' are encoded in every step, because of color_aug" in capsys.readouterr().out
    with pytest.raises(UserError, match="--cache_latents cannot work with --color_aug"):
        read(toml("color_aug = true"), in_folder, cache_latents=True)


def test_legacy_coordinates_of_a_random_crop_are_refused_in_a_file_too(in_folder: Path):
    images(in_folder / "a", "one.png")
    with pytest.raises(UserError, match="--legacy_crop_coords cannot work with --random_crop"):
        read(toml("random_crop = true"), in_folder, legacy_crop_coords=True)


@pytest.mark.parametrize(
    ("repeats", "num_visits", "expected"),
    [
        ([1, 1, 1], 7, [3, 2, 2]),
        ([2, 2, 2], 3, [2, 2, 0]),
        ([2, 2], 4, [2, 2]),
        ([1], 5, [5]),
    ],
)
def test_regularization_images_are_repeated_until_they_are_as_many(repeats, num_visits, expected):
    assert balanced_repeats(repeats, num_visits) == expected


def test_regularization_images_are_balanced_and_weighted(in_folder: Path):
    images(in_folder / "a", "one.png", "two.png")
    images(in_folder / "r", "three.png")
    text = toml(
        'class_tokens = "x"\nnum_repeats = 3\n[[datasets.subsets]]\nimage_dir = "r"\nis_reg = true\nclass_tokens = "y"'
    )
    found = find_training_images(read(text, in_folder, prior_loss_weight=0.25))
    assert repeats_of(found) == [3, 3, 6]
    assert [image.loss_weight for image in found] == [1.0, 1.0, 0.25]


def test_masks_are_those_of_the_subset_and_the_flag_is_the_default(in_folder: Path):
    for name in ("a", "b", "m"):
        (in_folder / name).mkdir()
    text = toml('conditioning_data_dir = "m"\n[[datasets.subsets]]\nimage_dir = "b"\nalpha_mask = false')
    subsets = read(text, in_folder, masked_loss=True, alpha_mask=True)
    assert [(subset.alpha_mask, subset.mask_dir) for subset in subsets] == [(True, Path("m")), (False, None)]
    with pytest.raises(UserError, match="there is no folder 'gone'"):
        read(toml('conditioning_data_dir = "gone"'), in_folder, masked_loss=True)
    options = TrainingSetOptions(dataset_config=in_folder / "sets.toml", masked_loss=True)
    with pytest.raises(UserError, match=r"--masked_loss: no subset of '.*sets.toml' has masks"):
        require_masks(options, read(toml(), in_folder, masked_loss=True))
