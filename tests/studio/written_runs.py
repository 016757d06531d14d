"""Folders as runs leave them, written without training: records, samples with their texts, grids, event files."""

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from PIL import Image, ImageDraw
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from library.samples.picture_files import SAMPLE_FOLDER, PictureRecord, grid_name, picture_name, save_picture
from library.samples.prompts import SamplePrompt
from library.training.run_record import FINISHED, RECORD_FOLDER, End, RunRecord, Start

BEGAN = datetime(2026, 11, 27, 10, 0, 0)
PROMPTS = (
    SamplePrompt("a cat on a sofa", "close-up, soft light", line=1, width=64, height=64, num_inference_steps=4),
    SamplePrompt("a red cup", "still life", negative_g="blurry", line=2, width=64, height=64, seed=5),
)


def event_bytes(event: Event) -> bytes:
    """Return an event as its file has it; readers do not look at the checksums."""
    data = event.SerializeToString()
    return struct.pack("<Q4x", len(data)) + data + bytes(4)


def scalar(name: str, step: int, value: float, time: float | None = None) -> bytes:
    """Return a point of a curve as an event file has it."""
    summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
    moment = BEGAN.timestamp() + step if time is None else time
    return event_bytes(Event(wall_time=moment, step=step, summary=summary))


def start_of_log(step: int) -> bytes:
    """Return what a resumed run writes first."""
    return event_bytes(Event(wall_time=BEGAN.timestamp(), step=step, session_log=SessionLog(status=SessionLog.START)))


def write_curves(folder: Path, num_steps: int, first: int = 1) -> Path:
    """Write the event file of a run whose gradient jumps once, half way."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"events.out.tfevents.{first:010}.here"
    with file.open("wb") as log:
        for step in range(first, num_steps + 1):
            loss = 0.1 + 0.2 * math.exp(-step / 50) + 0.01 * math.sin(step)
            values = {"loss/current": loss, "loss/average": 0.1 + 0.2 * math.exp(-step / 50), "lr/unet": 1e-5}
            values["grad_norm"] = 90.0 if step == num_steps // 2 else 1.0 + 0.1 * math.sin(step)
            if step % 10 == 0:
                values |= {"validation/loss": 0.2, "worth/l": 0.01, "worth/l/standard_error": 0.002}
            log.write(b"".join(scalar(name, step, value) for name, value in values.items()))
    return file


def write_samples(
    folder: Path,
    name: str,
    steps: Sequence[int],
    prompts: Sequence[SamplePrompt] = PROMPTS,
    began: datetime = BEGAN,
    side: int = 64,
) -> None:
    """Write the samples of a run: each step another colour."""
    for step in steps:
        for index, prompt in enumerate(prompts):
            now = began + timedelta(seconds=step)
            image = Image.new("RGB", (side, side), ((7 * step) % 256, 60 * index % 256, 120))
            ImageDraw.Draw(image).text((4, 4), f"{index} {step}", fill="white")
            seed = 11 if prompt.seed is None else prompt.seed
            record = PictureRecord(replace(prompt), "euler_a", side, side, seed, step, name)
            file = picture_name(name, now=now, step=step, epoch=None, index=index, seed=prompt.seed)
            save_picture(folder / SAMPLE_FOLDER / file, image, record)


def write_grid(folder: Path, name: str, step: int, began: datetime = BEGAN) -> None:
    """Write a grid of each L prompt with each G prompt."""
    image = Image.new("RGB", (120, 80), (step % 256, 90, 40))
    record = PictureRecord(PROMPTS[0], "euler_a", 64, 64, 3, step, name)
    save_picture(
        folder / SAMPLE_FOLDER / grid_name(name, now=began + timedelta(seconds=step), step=step), image, record
    )


def write_run(
    folder: Path,
    name: str = "m",
    *,
    num_steps: int = 100,
    sample_steps: Sequence[int] = (0, 50, 100),
    began: datetime = BEGAN,
    end: End | None = None,
    has_end: bool = True,
    pid: int | None = None,
    options: Mapping[str, object] | None = None,
    prompts: Sequence[SamplePrompt] = PROMPTS,
    side: int = 64,
) -> RunRecord:
    """Write what a run by hand leaves in its output folder; its logs lie below it."""
    logs = folder / "logs" / f"{began:%Y%m%d%H%M%S}"
    start = replace(Start.now(0), time=began.isoformat())
    if pid is not None:
        start = replace(start, pid=pid, created=1.0)
    finished = End((began + timedelta(seconds=num_steps)).isoformat(), num_steps, FINISHED)
    record = RunRecord(
        started=began.isoformat(),
        output_name=name,
        seed=7,
        options=options or {"learning_rate": 1e-5, "output_name": name, "output_dir": str(folder)},
        set={"images": 3, "held_out": 0, "steps": num_steps},
        captions={"l": "meta.json", "g": "meta.json"},
        log_folder=str(logs.absolute()),
        starts=(start,),
        end=(end or finished) if has_end else None,
    )
    file = folder / RECORD_FOLDER / f"{record.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(record.as_text(), encoding="utf-8")
    write_curves(logs, num_steps)
    write_samples(folder, name, sample_steps, prompts, began, side)
    for step in (sample_steps[0], sample_steps[-1]) if sample_steps else ():
        write_grid(folder, name, step, began)
    saved = folder / f"{name}-step{num_steps // 2:08d}.safetensors"
    saved.write_bytes(bytes(1000))
    moment = (began + timedelta(seconds=num_steps // 2)).timestamp()
    os.utime(saved, (moment, moment))
    return record
