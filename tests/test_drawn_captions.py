"""What the studio draws is what a dry run makes of the same data set file."""

import json

from library.captions.drawn_captions import drawn_captions
from library.captions.final_captions import CaptionPair
from library.captions.options import CaptionOptions
from library.editing.caption_set import CaptionSet
from library.images.buckets import BucketOptions
from studio.options import StudioOptions, subsets_of
from tests.conftest import PHOTOGRAPHS

CONFIG = """
[general]
shuffle_caption_l = true
caption_prefix_g = "photo,"
caption_dropout_rate = 0.2
caption_dropout_rate_g = 0.3
[[datasets]]
resolution = 128
min_bucket_reso = 64
  [[datasets.subsets]]
  image_dir = '{}'
"""


def test_draws_are_the_texts_of_a_dry_run(prepared_set, tiny_sdxl, tmp_path):
    import sdxl_train

    config, report = tmp_path / "set.toml", tmp_path / "report.jsonl"
    config.write_text(CONFIG.format(prepared_set.images), encoding="utf-8")
    argv = [
        *(f"--pretrained_model_name_or_path={tiny_sdxl}", f"--dataset_config={config}", f"--output_dir={tmp_path}"),
        *("--dry_run=3", f"--dry_run_report={report}", "--seed=5", "--max_train_epochs=3"),
    ]
    assert sdxl_train.main(argv) == 0
    images = {facts["key"]: facts["visits"] for facts in map(json.loads, report.read_text().splitlines())}

    subsets = subsets_of(StudioOptions([], dataset_config=config), CaptionOptions(), BucketOptions())
    opened = CaptionSet(subsets)
    opened.list_images()
    opened.load()
    assert {member.key for member in opened.members} == images.keys()
    num_dropped = 0
    for member in opened.members:
        captions = CaptionPair(*(member.captions[encoder].variants for encoder in "lg"))
        draws = drawn_captions(captions, opened.rules(member), key=member.key, seed=5, first_epoch=1, num_epochs=10)
        for draw, visit in zip(draws, images[member.key], strict=False):
            for drawn, read in ((draw.caption_l, visit["caption_l"]), (draw.caption_g, visit["caption_g"])):
                assert (drawn.is_dropped, drawn.reading.kept, drawn.reading.cut) == (
                    read["is_dropped"],
                    read["text"],
                    read["cut"],
                )
                assert drawn.reading.num_tokens == read["num_tokens"]
        num_dropped += sum(draw.caption_g.is_dropped for draw in draws)
        assert len(draws) == 10
    assert num_dropped > 0
    assert len(opened.members) == len(PHOTOGRAPHS)
