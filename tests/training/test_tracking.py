"""What a run shows and logs: read back out of TensorBoard's own files."""

import itertools
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from library.training import event_files, tracking
from library.training.learner import StepReport
from library.training.plan import Occasion
from library.training.tracking import Tracker, TrackingOptions


@pytest.fixture
def logged(tmp_path: Path, fresh_accelerate):
    """`logged(use)` returns what TensorBoard reads after `use(tracker)`; the average is over 2 steps."""

    def of(use, **options) -> EventAccumulator:
        accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path, cpu=True)
        tracker = Tracker(accelerator, TrackingOptions(tmp_path, **options), num_steps=4, steps_per_epoch=2)
        use(tracker)
        tracker.close()
        return EventAccumulator(str(tmp_path / (options.get("log_tracker_name") or "finetuning"))).Reload()

    return of


def scalars(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


def test_a_step_is_logged_with_its_average_rates_and_norm(logged):
    def use(tracker: Tracker) -> None:
        for step, loss in enumerate((1.0, 2.0, 4.0), start=1):
            rates = {"unet": 0.5, "text_encoder_l": 0.125, "text_encoder_g": 0.25}
            epoch = {2: 1, 3: 2}.get(step)  # the end of the run ends its epoch
            tracker.after_step(Occasion(step, epoch), StepReport(loss, rates, grad_norm=loss / 2))

    events = logged(use)
    assert scalars(events, "loss/current") == [(1, 1.0), (2, 2.0), (3, 4.0)]
    assert scalars(events, "loss/average") == [(1, 1.0), (2, 1.5), (3, 3.0)]
    assert scalars(events, "lr/unet") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert scalars(events, "lr/text_encoder_g") == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert scalars(events, "loss/epoch") == [(2, 1.5), (3, 3.0)]
    assert (
        scalars(events, "lr/text_encoder1")
        == scalars(events, "lr/text_encoder_l")
        == [(1, 0.125), (2, 0.125), (3, 0.125)]
    )
    assert scalars(events, "lr/text_encoder2") == scalars(events, "lr/text_encoder_g")
    assert scalars(events, "grad_norm") == [(1, 0.5), (2, 1.0), (3, 2.0)]


def test_images_epochs_and_memory_are_logged(logged, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(tracking, "time", clock)

    def use(tracker: Tracker) -> None:
        for step, num_images in enumerate((4, 4, 1), start=1):
            clock.seconds += 0.5
            tracker.after_step(Occasion(step), StepReport(1.0, {}, None, num_images))

    events = logged(use)
    assert scalars(events, "images_seen") == [(1, 4), (2, 8), (3, 9)]
    assert scalars(events, "images_per_second") == [(1, 8.0), (2, 8.0), (3, 2.0)]
    assert scalars(events, "epoch") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert all(0.01 < value < 1000 for _, value in scalars(events, "memory/host_gib"))


def test_without_clipping_no_norm_is_logged(logged):
    events = logged(lambda tracker: tracker.after_step(Occasion(1), StepReport(1.0, {}, None)), log_tracker_name="mine")
    assert "grad_norm" not in events.Tags()["scalars"]


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


def test_the_time_of_samples_and_saves_is_not_the_steps(logged, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(tracking, "time", clock)

    def use(tracker: Tracker) -> None:
        for step in (1, 2):
            with tracker.untimed():
                clock.seconds += 8.0
            clock.seconds += 0.25
            tracker.after_step(Occasion(step), StepReport(1.0, {}, None))

    assert scalars(logged(use), "steps_per_second") == [(1, 4.0), (2, 4.0)]


def test_the_bar_tells_the_time_left_by_steps_alone(logged, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(tracking, "time", clock)
    shown = []

    def use(tracker: Tracker) -> None:
        bar = tracker._bar
        bar._time = clock.perf_counter
        bar.start_t = bar.last_print_t = 0.0
        for step in (1, 2):
            with tracker.untimed():
                clock.seconds += 800.0
            clock.seconds += 2.0
            tracker.after_step(Occasion(step), StepReport(1.0, {}, None))
            shown.append((bar.format_dict["rate"], bar.format_dict["elapsed"]))

    logged(use)
    assert shown == [(0.5, 802.0), (0.5, 1604.0)]


def test_a_picture_is_shown_with_how_it_was_drawn(logged):
    image = Image.new("RGB", (16, 8), (255, 0, 0))
    events = logged(lambda tracker: tracker.log_image(3, "sample/00", image, "a cat\nSteps: 2"))
    [shown] = events.Images("sample/00")
    assert (shown.step, shown.width, shown.height) == (3, 16, 8)
    [text] = events.Tensors("sample/00/text/text_summary")
    assert text.tensor_proto.string_val == [b"a cat  \nSteps: 2"]


IMAGE = Image.new("RGB", (8, 8), "red")


def shown_at(folder: Path, step: int) -> list[str]:
    """What TensorBoard's page shows of a step, each as often as it does."""
    events = plugin_event_accumulator.EventAccumulator(str(folder), tensor_size_guidance={}).Reload()
    return sorted(name for name in events.Tags()["tensors"] for event in events.Tensors(name) if event.step == step)


@pytest.mark.parametrize("num_whole_records", [0, 1, 2], ids=["none", "the image", "image and text"])
def test_a_resumed_run_shows_what_a_killed_one_did_not_log_and_nothing_twice(
    num_whole_records: int, tmp_path: Path, fresh_accelerate
):
    """The event file of the first run ends within a record, as a kill leaves it, or behind the last."""

    def run(steps_done: int, *step_and_name: tuple[int, str]) -> None:
        accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path, cpu=True)
        tracker = Tracker(accelerator, TrackingOptions(tmp_path), num_steps=4, steps_per_epoch=2, steps_done=steps_done)
        for step, name in step_and_name:
            tracker.log_image(step, name, IMAGE, "a cat")
        tracker.close()
        for file in folder.glob("*.tfevents.*.*"):  # as if each run had begun in another second
            file.rename(folder / f"events.out.tfevents.{len(list(folder.iterdir()))}")

    folder = tmp_path / "finetuning"
    run(0, (2, "sample/00"))
    [file] = folder.glob("*tfevents*")
    ends = list(itertools.accumulate(len(record) + 16 for record in event_files._records(file)))
    cut = ends[-1] - (ends[-1] - ends[-2]) // 2 if num_whole_records == 1 else ends[num_whole_records - 3]
    file.write_bytes(file.read_bytes()[:cut])

    run(2, (2, "sample/00"), (3, "sample/00"))
    assert shown_at(folder, 2) == shown_at(folder, 3) == ["sample/00", "sample/00/text/text_summary"]

    run(1, (2, "sample/00"), (3, "sample/00"))  # from an older state: the steps behind it are logged again
    run(3, (3, "sample/00"))
    assert shown_at(folder, 2) == shown_at(folder, 3) == ["sample/00", "sample/00/text/text_summary"]


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "trackers"),
    [
        (TrackingOptions(), []),
        (TrackingOptions(logging_dir=Path("logs")), ["tensorboard"]),
        (TrackingOptions(logging_dir=Path("logs"), log_with="wandb"), ["wandb"]),
        (TrackingOptions(log_with="all"), ["tensorboard", "wandb"]),
    ],
)
def test_a_logging_folder_alone_means_tensorboard(options: TrackingOptions, trackers: list[str]):
    assert options.trackers == trackers


def test_each_run_has_its_own_log_folder_named_by_time():
    now = datetime(2026, 2, 3, 4, 5, 6)
    options = TrackingOptions(logging_dir=Path("my logs"), log_prefix="cats_")
    assert options.run_folder(now) == Path("my logs/cats_20260203040506")
    assert TrackingOptions().run_folder(now) is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (TrackingOptions(log_with="tensorboard"), "--log_with tensorboard needs --logging_dir."),
        (TrackingOptions(log_prefix="x"), "--log_prefix needs --logging_dir."),
        (TrackingOptions(log_tracker_name="x"), "--log_tracker_name needs --logging_dir or --log_with."),
    ],
)
def test_what_would_be_ignored_is_a_problem(options: TrackingOptions, problem: str):
    assert list(options.problems()) == [problem]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"log_config": True}, "--log_config needs --logging_dir or --log_with."),
        ({"log_tracker_config": Path("no.toml")}, "--log_tracker_config needs --logging_dir or --log_with."),
        ({"wandb_api_key": "k"}, "--wandb_api_key needs --log_with=wandb."),
    ],
)
def test_flags_without_a_tracker_are_a_problem(options, problem: str):
    assert problem in list(TrackingOptions(**options).problems())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[tensorbord]\nflush_secs = 1\n", "has a section 'tensorbord'; trackers are tensorboard, wandb. Did you mean"),
        ("flush_secs = 1\n", "flush_secs stands in no section. Put it below [wandb]."),
        ("[tensorboard\n", "is not valid TOML"),
        (None, "cannot read"),
    ],
)
def test_a_file_for_trackers_with_a_mistake_is_one_sentence(text, problem: str, tmp_path: Path):
    path = tmp_path / "trackers.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    [found] = TrackingOptions(tmp_path, log_tracker_config=path).problems()
    assert found.startswith("--log_tracker_config: ")
    assert problem in found


def test_arguments_that_a_tracker_does_not_take_are_named_before_training(tmp_path: Path):
    path = tmp_path / "trackers.toml"
    path.write_text(
        "[tensorboard]\nflush_sec = 1\nlog_dir = 'x'\nmax_queue = 2\n[wandb]\nnonsense = 1\n", encoding="utf-8"
    )
    options = TrackingOptions(tmp_path / "logs", log_tracker_config=path)
    assert list(options.problems()) == []
    assert list(options.heavy_problems()) == [
        "--log_tracker_config: tensorboard takes no 'flush_sec'. Did you mean flush_secs?",
        "--log_tracker_config: 'log_dir' of tensorboard is set by --logging_dir and --log_tracker_name; remove it.",
    ]


def test_trackers_are_started_as_the_file_says(logged, tmp_path: Path):
    path = tmp_path / "trackers.toml"
    path.write_text("[tensorboard]\nfilename_suffix = '.mine'\n", encoding="utf-8")
    logged(lambda tracker: tracker.after_step(Occasion(1), StepReport(1.0, {}, None)), log_tracker_config=path)
    assert list((tmp_path / "finetuning").glob("events*.mine"))


def test_a_run_is_logged_by_wandb_without_a_network_and_without_its_key(train, tmp_path: Path, monkeypatch):
    """The package itself, where it is installed, writes what `wandb sync` would send."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "trackers.toml").write_text("[wandb]\ntags = ['of the test']\n", encoding="utf-8")
    key = "0123456789abcdef0123456789abcdef01234567"
    train(
        *("--max_train_steps=1", "--log_with=all", "--log_config", f"--wandb_api_key={key}", "--wandb_run_name=cats"),
        f"--log_tracker_config={tmp_path / 'trackers.toml'}",
    )
    assert os.environ.pop("WANDB_API_KEY") == key
    [written] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    for expected in ("cats", "of the test", "loss/current", "images_per_second", "optimizer_type", "torch.optim.SGD"):
        assert expected.encode() in content
    for hidden in ("output_dir", "train_data_dir", "wandb_api_key"):  # of the options: what the console shows is kept
        assert hidden.encode() not in content
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


WANDB = """
class Config:
    def update(self, *arguments, **settings): pass

class Run:
    config = Config()
    def __init__(self, **settings): print("project", settings["project"], "name", settings.get("name"))
    def finish(self): pass

config = Config()
init = Run
"""
START_A_RUN = """
from accelerate import Accelerator
from library.training.tracking import Tracker, TrackingOptions
options = TrackingOptions(log_with="wandb", wandb_run_name="cats")
assert list(options.problems()) == []
Tracker(Accelerator(log_with="wandb", cpu=True), options, num_steps=1, steps_per_epoch=1).close()
"""


def test_a_run_has_its_name_in_wandb(tmp_path: Path):
    """In place of the package, whose service needs an account, stands one that prints what it is handed."""
    for name, text in (("wandb/__init__.py", WANDB), ("wandb-1.0.dist-info/METADATA", "Name: wandb\nVersion: 1.0\n")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", START_A_RUN]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert ended.stdout == "project finetuning name cats\n"
