"""Run the whole workflow on photographs and a full-size SDXL of random weights; measure time and memory.

    python benchmarks/full_size_workflow.py WORK_FOLDER [--num_steps 3]

WORK_FOLDER takes 25 GB. The result goes to benchmarks/results/full_size_workflow.{json,txt}. Needs scikit-image and
scikit-learn for their photographs, and Linux to measure memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.ceilings import machine
from benchmarks.phases import STARTED_VARIABLE
from benchmarks.result_files import RESULTS, machine_line, write_result
from library.optim.options import ADAFACTOR_RECIPE

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "retina")
PROMPT = "portrait of a woman --e photographic --n low quality --w 256 --h 256 --d 42 --l 7 --s 2\n"

TRAINING = (
    "--resolution=256,256 --save_model_as=safetensors --full_bf16 --output_name=finetuned_model "
    "--max_data_loader_n_workers=0 --learning_rate=1e-5 --train_batch_size=1 --mixed_precision=bf16 "
    "--save_precision=bf16 --cache_latents --cache_latents_to_disk --optimizer_type=Adafactor "
    f"{ADAFACTOR_RECIPE} weight_decay=0.01 "
    "--gradient_checkpointing --max_grad_norm=0.0 --noise_offset=0.0357 --adaptive_noise_scale=0.00357 "
    "--sample_sampler=euler_a --no_half_vae --seed=1"
)

CHECK = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file, write_single_file
from library.sdxl.tensor_file import open_tensors
started = time.perf_counter()
model = read_single_file(Path(sys.argv[2]), ModelDtypes())
print(f"load_again_s={time.perf_counter() - started:.2f}")
copy = Path(sys.argv[2]).with_name("copy.safetensors")
write_single_file(copy, model, None, {})
with open_tensors(Path(sys.argv[2])) as one, open_tensors(copy) as two:
    same = one.shapes == two.shapes and all(torch.equal(one.get(name), two.get(name)) for name in one.shapes)
    print(f"load_save_load_is_identity={same} tensors={len(one.shapes)}")
with open_tensors(Path(sys.argv[3])) as source, open_tensors(copy) as written:
    print(f"names_and_shapes_of_the_input={source.shapes == written.shapes}")
copy.unlink()
"""

DIFFUSERS = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from diffusers import StableDiffusionXLPipeline
from library.sdxl.architecture import SDXL_BASE, empty_model
from library.sdxl.diffusers_folder import write_diffusers_configs
config = Path(sys.argv[2]).with_name("config")
write_diffusers_configs(config, empty_model(SDXL_BASE))
started = time.perf_counter()
pipeline = StableDiffusionXLPipeline.from_single_file(sys.argv[2], config=str(config), torch_dtype=torch.bfloat16)
print(f"diffusers_load_s={time.perf_counter() - started:.2f}")
size = {"width": 256, "height": 256}
picture = pipeline("photographic", prompt_2="a woman", num_inference_steps=1, output_type="latent", **size)
print(f"diffusers_latents_finite={bool(picture.images.isfinite().all())} shape={list(picture.images.shape)}")
"""


def measured(name: str, command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a command; return its seconds, its peak resident memory and its output."""
    print(f"-- {name}", flush=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, **(environment or {})}
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{name} failed: {printed}")
    seconds = time.perf_counter() - started
    return {
        "phase": name,
        "seconds": round(seconds, 2),
        "max_rss_gib": round(usage.ru_maxrss / 2**20, 2),
        "out": printed,
    }


def prepare_folder(folder: Path) -> None:
    """Write photographs with both captions and the prompt file; remove what an earlier run left."""
    images = folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    pictures = {name: getattr(skimage.data, name)() for name in PHOTOGRAPHS}
    pictures |= dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    for name, pixels in pictures.items():
        Image.fromarray(pixels).convert("RGB").save(images / f"{name}.png")
        (images / f"{name}.txt").write_text("photographic", encoding="utf-8")
        (images / f"{name}.caption").write_text(f"a picture called {name}", encoding="utf-8")
    (folder / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    for left_over in ("meta_cap.json", "meta_lat.json"):
        (folder / left_over).unlink(missing_ok=True)
    shutil.rmtree(folder / "output", ignore_errors=True)


def run(folder: Path, num_steps: int) -> dict[str, Any]:
    """Return the rows of all phases; those of the training process come from benchmarks/phases.py."""
    model, output = folder / "sd_xl_random.safetensors", folder / "output"
    prepare_folder(folder)
    python = sys.executable
    rows = []
    if not model.is_file():
        rows.append(measured("make weights", [python, str(ROOT / "demo/random_sdxl.py"), str(model), "--size=full"]))
    images, captions, latents = (str(folder / name) for name in ("images", "meta_cap.json", "meta_lat.json"))
    for encoder in "gl":
        script = ROOT / f"finetune/sdxl_merge_captions_{encoder}_to_metadata.py"
        rows.append(measured(f"merge {encoder.upper()}", [python, str(script), images, captions]))
    prepare = [python, str(ROOT / "finetune/prepare_buckets_latents.py"), images, captions, latents, str(model)]
    limits = ["--max_resolution=256,256", "--min_bucket_reso=128", "--max_bucket_reso=512", "--mixed_precision=bf16"]
    rows.append(measured("prepare", [*prepare, *limits]))
    flags = [
        f"--pretrained_model_name_or_path={model}",
        f"--in_json={latents}",
        f"--train_data_dir={images}",
        f"--output_dir={output}",
        f"--logging_dir={folder / 'logs'}",
        f"--max_train_steps={num_steps}",
        *TRAINING.split(),
    ]
    trainer = [python, str(ROOT / "benchmarks/phases.py")]
    sampled = [f"--sample_prompts={folder / 'prompt.txt'}", f"--sample_every_n_steps={num_steps}"]
    for name, extra in (("train", []), ("train with samples", sampled)):
        figures = folder / "phases.json"
        started = {STARTED_VARIABLE: str(time.time()), "THP_MEM_ALLOC_ENABLE": "1"}
        row = measured(name, [*trainer, str(figures), *flags, *extra], started)
        rows.append(row | {"phases": json.loads(figures.read_text(encoding="utf-8"))})
    written = output / "finetuned_model.safetensors"
    rows.append(measured("load again", [python, "-c", CHECK, str(ROOT), str(written), str(model)]))
    rows.append(measured("diffusers", [python, "-c", DIFFUSERS, str(ROOT), str(written)]))
    return {"machine": machine(), "num_steps": num_steps, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    lines = [machine_line(result["machine"]), ""]
    for row in result["rows"]:
        lines.append(f"{row['phase']:32} {row['seconds']:8.2f} s   peak resident {row['max_rss_gib']:6.2f} GiB")
        for phase in row.get("phases", []):
            lines.append(
                f"    {phase['phase']:30} {phase['seconds']:6.2f} s   from start {phase['from_start_s']:7.2f} s   "
                f"peak anonymous {phase['peak_gib']:6.2f} GiB"
            )
        if row["phase"] in ("load again", "diffusers"):
            lines += [f"    {line}" for line in row["out"].splitlines()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num_steps", type=int, default=3)
    arguments = parser.parse_args()
    result = run(arguments.folder.resolve(), arguments.num_steps)
    text = table(result)
    for row in result["rows"]:
        row.pop("out")  # contains paths of this machine
    write_result(RESULTS / "full_size_workflow", result, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
