"""Measure captions by machine: images a second, how long the model waits for them, and a folder that is done already.

    python benchmarks/captioners.py [--num_images 96] [--num_done 100000]

The models are small and random, and take about as long as trained ones of their size: a tagger of four convolutions at
448 pixels with 9083 labels, and BLIP of six and four blocks at 384 pixels, which says 12 tokens. The images are
photographs of scikit-image as JPEGs of 1536 x 1024. The share of time in which the model works is what counts on a
busy machine. The results go to benchmarks/results/captioners_cpu.{json,txt}.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import numpy as np
import onnx
import skimage
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from benchmarks import ceilings
from benchmarks.result_files import RESULTS, machine_line, write_result
from library.annotation.captioner import Captioner
from library.annotation.captioner_model import open_captioner
from library.annotation.describing import CaptionWriter, write_captions
from library.annotation.image_options import ImageOptions
from library.annotation.pending_images import pending_images
from library.annotation.reading_ahead import Machine
from library.annotation.sentence_options import CaptionerOptions, WordOptions
from library.annotation.tag_choice import Label, tag_choice
from library.annotation.tag_options import TagOptions
from library.annotation.tagger import open_tagger
from library.config.processes import Share

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "cat")
SIZE = (1536, 1024)
SIDE = 448
NUM_LABELS = 9083
CHANNELS = (3, 64, 128, 256, 512)
NUM_WORDS = 2000
NUM_TOKENS = 12
BATCH_SIZES = (1, 8)


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=96)
    parser.add_argument("--num_done", type=int, default=100_000)
    options = parser.parse_args()
    machine = ceilings.machine()
    load_before = os.getloadavg()[0]
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_photographs(folder / "images", options.num_images)
        models: dict[str, Machine] = {"tagger": small_tagger(folder), "captioner": small_captioner(folder, images)}
        for what, model in models.items():
            for batch_size in BATCH_SIZES:
                figures[f"{what}, batch {batch_size}"] = timed(images, model, batch_size)
        seconds, processor_seconds = seconds_of_done(folder / "done", options.num_done)
    loads = f"load {load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
    rows = [
        f"    {what:<22} {each['images_per_second']:>7.2f} images a second, the model works "
        f"{each['share_of_model'] * 100:5.1f} % of the time"
        for what, each in figures.items()
    ]
    done = (
        f"    {options.num_done} images that have a file: {seconds:.1f} s from the start of the script to its end "
        f"({processor_seconds:.1f} s of the processor)"
    )
    table = "\n".join([machine_line(machine), loads, "", f"{options.num_images} photographs:", *rows, "", done])
    print(table)
    result: dict[str, Any] = {"machine": machine, "loads": loads, "figures": figures}
    result |= {"seconds_of_done": seconds, "processor_seconds_of_done": processor_seconds}
    write_result(RESULTS / "captioners_cpu", result, table)
    return 0


def timed(images: Path, model: Machine, batch_size: int) -> dict[str, float]:
    """Caption a folder; return images a second, and the share of the time in which the model worked."""
    options = ImageOptions(images, overwrite=True, batch_size=batch_size)
    pending = pending_images(images, ".txt", recursive=False, keep_existing=False, batch_size=batch_size, share=Share())
    writer = CaptionWriter(images, ".txt", keeps_existing=False)
    tally = write_captions(pending, model, writer, options, batch_size, Share())
    assert tally.num_without == 0
    return {
        "images_per_second": tally.num_written / tally.seconds,
        "share_of_model": tally.seconds_of_model / tally.seconds,
    }


def seconds_of_done(folder: Path, num_images: int) -> tuple[float, float]:
    """Return how long the tagger takes for a folder in which all is done: by the clock, of the processor."""
    folder.mkdir()
    for number in range(num_images):
        (folder / f"{number:06}.jpg").touch()
        (folder / f"{number:06}.txt").touch()
    started, used = time.perf_counter(), os.times()
    script = ROOT / "finetune" / "tag_images_by_wd14_tagger.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, stdout=subprocess.DEVNULL)
    now = os.times()
    processor = now.children_user + now.children_system - used.children_user - used.children_system
    return time.perf_counter() - started, processor


def write_photographs(folder: Path, num_images: int) -> Path:
    """Write so many JPEGs, the same few photographs again and again."""
    folder.mkdir()
    for place, name in enumerate(PHOTOGRAPHS):
        image = Image.fromarray(getattr(skimage.data, name)()).resize(SIZE, Image.Resampling.LANCZOS)
        for number in range(place, num_images, len(PHOTOGRAPHS)):
            image.save(folder / f"{number:04}.jpg", quality=92)
    return folder


def small_tagger(folder: Path) -> Machine:
    """Return a tagger of four convolutions and random weights."""
    random = np.random.default_rng(0)
    nodes = [helper.make_node("Transpose", ["image"], ["x0"], perm=[0, 3, 1, 2])]
    weights: dict[str, np.ndarray] = {}
    for layer, (before, after) in enumerate(pairwise(CHANNELS)):
        side, stride = (4, 4) if layer == 0 else (3, 2)
        weights[f"w{layer}"] = random.normal(0, (before * side * side) ** -0.5, (after, before, side, side))
        pads = [0] * 4 if layer == 0 else [1] * 4
        nodes.append(
            helper.make_node("Conv", [f"x{layer}", f"w{layer}"], [f"c{layer}"], strides=[stride] * 2, pads=pads)
        )
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"x{layer + 1}"]))
    weights["head"] = random.normal(0, 0.1, (CHANNELS[-1], NUM_LABELS))
    nodes += [
        helper.make_node("ReduceMean", [f"x{len(CHANNELS) - 1}", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "head"], ["scores"]),
        helper.make_node("Sigmoid", ["scores"], ["tags"]),
    ]
    initial = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("tags", TensorProto.FLOAT, ["N", NUM_LABELS])],
        [*initial, numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    labels = [Label(f"tag_{number}", "0") for number in range(NUM_LABELS)]
    return open_tagger(path, tag_choice(labels, TagOptions(thresh=0.9999)), ", ")


def small_captioner(folder: Path, images: Path) -> Machine:
    """Return BLIP of a few blocks and random weights."""
    torch.manual_seed(0)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(NUM_WORDS))]
    tokenizer = BertTokenizer(vocab={name: index for index, name in enumerate(names)})
    small = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    text = {**small, "num_hidden_layers": 4, "vocab_size": len(names), "encoder_hidden_size": 256}
    text |= {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**small, "num_hidden_layers": 6, "image_size": 384, "patch_size": 16}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=256, image_text_hidden_size=256)
    path = folder / "blip"
    BlipForConditionalGeneration(config).save_pretrained(path)
    BlipProcessor(BlipImageProcessor(size={"height": 384, "width": 384}), tokenizer).save_pretrained(path)
    words = WordOptions(max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
    model = open_captioner(str(path), "no")
    return Captioner(model, CaptionerOptions(str(path)), words, images, max_image_side=1024)


if __name__ == "__main__":
    sys.exit(main())
