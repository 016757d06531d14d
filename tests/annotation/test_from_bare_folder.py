"""From a folder of bare photographs to a trained model: tag, caption, clean, merge, prepare, train."""

import json

from finetune import (
    clean_captions_and_tags,
    make_captions,
    prepare_buckets_latents,
    sdxl_merge_captions_g_to_metadata,
    sdxl_merge_captions_l_to_metadata,
    tag_images_by_wd14_tagger,
)
from tests.annotation.conftest import PHOTOGRAPHS, captions_in, run
from tests.conftest import BUCKET_FLAGS


def test_captions_by_machine_are_trained(photographs, tagger, llava, tiny_sdxl, train, unet_inputs):
    meta_cap, meta_lat = photographs.parent / "meta_cap.json", photographs.parent / "meta_lat.json"
    model = [f"--model_name_or_path={llava}", "--max_new_tokens=6"]
    assert run(tag_images_by_wd14_tagger, photographs, f"--model_dir={tagger}", "--remove_underscore") == 0
    assert run(make_captions, photographs, *model, "--also_read=l", "--batch_size=3") == 0
    assert run(clean_captions_and_tags, photographs, "--encoder=l", "--prefix=photographic, ", "--sort") == 0
    for script in (sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata):
        assert script.main([str(photographs), str(meta_cap)]) == 0
    argv = [photographs, meta_cap, meta_lat, tiny_sdxl, "--max_resolution=128,128", *BUCKET_FLAGS]
    assert prepare_buckets_latents.main([str(argument) for argument in argv]) == 0

    texts = {".txt": captions_in(photographs, ".txt"), ".caption": captions_in(photographs, ".caption")}
    entries = json.loads(meta_lat.read_text(encoding="utf-8"))
    assert sorted(entries) == list(PHOTOGRAPHS)
    for name, entry in entries.items():
        assert entry["captionL"].startswith("photographic, ")
        assert entry["captionL"] == texts[".txt"][f"{name}.txt"].strip()
        assert entry["captionG"] == texts[".caption"][f"{name}.caption"].strip()
    trained = train(f"--in_json={meta_lat}", f"--train_data_dir={photographs}", "--max_train_steps=2")
    assert len(trained.logged("loss/current")) == 2
    assert len(unet_inputs) == 2
