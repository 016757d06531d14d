"""A run with stops in between is the run without: the same weights, losses, pictures and names, bit for bit."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import sdxl_train
from library.training.learner import StepReport
from library.training.plan import Occasion
from library.training.stopping import STOP_FILE
from library.training.tracking import Tracker
from tests.conftest import BUCKET_FLAGS, PreparedSet, base_flags, forget_accelerator
from tests.outcome import Outcome, differences, outcome_of


@dataclass(frozen=True)
class Trainer:
    """Runs sdxl_train.py on the tiny SDXL, three images, output and logs in its own folder."""

    argv: list[str]
    folder: Path

    def run(self, *flags: str) -> int:
        forget_accelerator()
        return sdxl_train.main([*self.argv, f"--logging_dir={self.folder / 'logs'}", *flags])

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def outcome(self, *, less: tuple[int, ...] = ()) -> Outcome:
        """What is there, less what was saved at the stops after these steps."""
        found = outcome_of(self.output, self.folder / "logs")
        return {name: thing for name, thing in found.items() if not name.endswith(tuple(_saved_at(less)))}


def _saved_at(steps: tuple[int, ...]) -> list[str]:
    return [f"m-step{step:08d}{end}" for step in steps for end in ("", "_ema", "-state")] or [" "]


@pytest.fixture
def trainer(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path: Path):
    """`trainer("name", *flags)` trains in a folder of that name; sample pictures of 64x64 in one step."""
    prompts = tmp_path / "prompt.txt"
    prompts.write_text("a dog --e photo --w 64 --h 64 --s 1", encoding="utf-8")
    (tmp_path / "masks").mkdir()
    for path in prepared_set.images.glob("*.jpg"):  # opaque from the left to the right
        Image.linear_gradient("L").rotate(90).resize(Image.open(path).size).save(tmp_path / f"masks/{path.stem}.png")

    def make(name: str, *flags: str) -> Trainer:
        argv = [
            *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, tmp_path / name / "output"),
            f"--sample_prompts={prompts}",
            *("--output_name=m", "--resolution=128,128", "--seed=7", "--enable_bucket", *BUCKET_FLAGS),
            *(flag.format(folder=tmp_path) for flag in flags),
        ]
        return Trainer(argv, tmp_path / name)

    return make


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):
    """`stop_after(trainer, step)` lays the stop file while that step is under way; None lays none."""
    after_step = Tracker.after_step

    def arrange(trainer: Trainer, last: int | None) -> None:
        def log_and_stop(tracker: Tracker, occasion: Occasion, report: StepReport | None) -> None:
            after_step(tracker, occasion, report)
            if report is not None and occasion.step == last:
                (trainer.output / STOP_FILE).touch()

        monkeypatch.setattr(Tracker, "after_step", log_and_stop)

    return arrange


# Three pictures in batches of one. The first: two batches a step, so two steps an epoch; stopped in the middle of an
# epoch, at the end of one, and again. The others: three steps an epoch.
WAYS = {
    "float32, accumulation, mirrored, cosine": (
        *("--cache_latents", "--flip_aug", "--gradient_accumulation_steps=2", "--max_train_steps=4"),
        *("--learning_rate=1e-3", "--lr_scheduler=cosine", "--lr_warmup_steps=2", "--sample_every_n_steps=2"),
        *("--save_every_n_steps=3", "--save_last_n_steps=9", "--ema", "--ema_every=2"),
        *("--masked_loss", "--conditioning_data_dir={folder}/masks"),
    ),
    "bfloat16, Adafactor, text encoders": (
        *("--mixed_precision=bf16", "--full_bf16", "--train_text_encoder", "--max_train_steps=4"),
        *("--optimizer_type=Adafactor", "--optimizer_args", "scale_parameter=False", "relative_step=False"),
        *("warmup_init=False", "--learning_rate=1e-3", "--sample_every_n_epochs=1", "--save_every_n_epochs=1"),
        *("--lr_scheduler_type=OneCycleLR", "--lr_scheduler_args", "max_lr=2e-3,total_steps=4,cycle_momentum=False"),
        *("--save_state", "--fused_backward_pass", "--max_grad_norm=0.01", "--stop_training_te1=2"),
        *("--ema", "--ema_precision=bf16", "--sample_ema", "--ema_snapshot_every_n_steps=2"),
        *("--v_parameterization", "--zero_terminal_snr", "--loss_weighting=edm2", "--stratified_timesteps"),
    ),
    "bfloat16 with compensation, schedule-free, offloaded": (
        *("--mixed_precision=bf16", "--full_bf16", "--bf16_rounding=kahan", "--optimizer_type=AdamWScheduleFree"),
        *("--offload_optimizer", "--learning_rate=1e-3", "--max_train_steps=4", "--sample_every_n_steps=2"),
    ),
}


STOPS = [(0, (1, 2)), pytest.param(1, (3,), marks=pytest.mark.slow), pytest.param(2, (2,), marks=pytest.mark.slow)]


@pytest.mark.parametrize(("way", "stops"), STOPS, ids=list(WAYS))
def test_stops_change_nothing(way: int, stops: tuple[int, ...], trainer, stop_after):
    flags = list(WAYS.values())[way]
    at_once = trainer("at once", *flags, "--max_data_loader_n_workers=0")
    assert at_once.run() == 0

    stopped = trainer("with stops", *flags)
    resume: tuple[str, ...] = ()
    for number, stop in enumerate((*stops, None)):
        stop_after(stopped, stop)
        workers = f"--max_data_loader_n_workers={(0, 2)[number % 2]}"
        assert stopped.run(*resume, workers) == 0
        resume = ("--resume=latest",)

    expected = at_once.outcome()
    assert len([name for name in expected if name.startswith("picture ") and not name.endswith("_ema.png")]) == 3
    assert ("model m_ema" in expected) == ("--ema" in flags)
    assert differences(expected, stopped.outcome(less=stops)) == []


@pytest.mark.slow  # three runs, two processes
def test_a_run_that_goes_on_in_two_processes_changes_nothing(trainer, run_server, free_port):
    flags = (
        *("--max_train_steps=3", "--max_data_loader_n_workers=0", "--learning_rate=1e-3", "--sample_at_first"),
        *("--loss_weighting=edm2", "--stratified_timesteps", "--ema", "--ema_snapshot_every_n_steps=1"),
    )

    def run(made: Trainer, *more: str, stop: bool = False) -> int:
        made.folder.mkdir(exist_ok=True)
        logs = f"--logging_dir={made.folder / 'logs'}"
        port = str(free_port())
        runs = [
            run_server("train", [*made.argv, logs, *more], WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, PORT=port)
            for rank in ("0", "1")
        ]
        if stop:
            runs[0].wait_until_said("1/3")
            runs[1].send(signal.SIGTERM)  # one of them is enough
        return max(each.wait() for each in runs)

    at_once, stopped = trainer("at once", *flags), trainer("stopped", *flags)
    assert run(at_once) == 0
    assert run(stopped, stop=True) in (0, 143)  # 0 for those to whom nobody has sent anything
    [state] = stopped.output.glob("m-step*-state")
    step = json.loads((state / "progress.json").read_text(encoding="utf-8"))["step"]
    assert run(stopped, "--resume=latest") == 0
    expected = at_once.outcome()
    assert {"model m_ema", "snapshot m-step00000003-sigma0.100.safetensors"} <= expected.keys()
    assert differences(expected, stopped.outcome(less=(step,))) == []


def test_what_is_done_is_not_done_again(trainer, stop_after, capsys):
    finished = trainer("finished", "--max_train_steps=1", "--sample_every_n_steps=1", "--save_state_on_train_end")
    assert finished.run("--max_data_loader_n_workers=0") == 0
    before = finished.outcome()
    capsys.readouterr()
    assert finished.run("--resume=latest") == 0
    assert differences(before, finished.outcome()) == []
    assert "resuming after step 1" in capsys.readouterr().out


@pytest.mark.slow  # nine steps with samples
def test_a_run_goes_on_where_an_epoch_has_become_shorter_than_what_was_done_of_it(trainer, stop_after):
    flags = ("--max_train_steps=7", "--max_data_loader_n_workers=0", "--sample_every_n_epochs=1")
    shortened = trainer("shortened", *flags)
    stop_after(shortened, 5)
    assert shortened.run("--dataset_repeats=2") == 0  # six steps an epoch; then three
    stop_after(shortened, None)
    assert shortened.run("--resume=latest", "--resume_anyway") == 0
    names = shortened.outcome()
    assert "model m" in names
    assert [name[-10:-7] for name in names if name.startswith("picture m_TIME_e")] == ["001", "002"]


@pytest.mark.slow  # several runs
def test_another_learning_rate_holds_from_the_state_on(trainer):
    one = trainer("one", "--save_every_n_steps=1", "--save_state", "--max_data_loader_n_workers=0")
    rates = "--sample_at_first", "--lr_scheduler=linear"
    assert one.run("--max_train_steps=1", "--learning_rate=1e-3", *rates) == 0
    assert one.run("--max_train_steps=4", "--learning_rate=1e-4", "--resume=latest", *rates) == 0
    shown = [value for _, value in one.outcome()["curve lr/unet"]]
    # Linear from the rate to 0 in 4 steps, as the second run has it, after its first quarter.
    assert shown[1:] == pytest.approx([0.75e-4, 0.5e-4, 0.25e-4])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(
            lambda entries: entries["coffee"].update(captionL="another"),
            "1 images with another image, bucket",
            marks=pytest.mark.slow,
            id="caption",
        ),
        pytest.param(
            lambda entries: entries.pop("coffee"), "1 images removed: coffee", marks=pytest.mark.slow, id="removed"
        ),
        pytest.param(lambda entries: entries.update(astronaut=entries.pop("astronaut")), "another order", id="order"),
    ],
)
def test_other_images_are_named_before_a_step_is_taken(change, named: str, trainer, prepared_set, tmp_path, capsys):
    made = trainer("changed", "--max_train_steps=1", "--save_state", "--sample_at_first")
    assert made.run("--max_data_loader_n_workers=0") == 0
    entries = json.loads(prepared_set.latents_json.read_text(encoding="utf-8"))
    change(entries)
    (tmp_path / "changed.json").write_text(json.dumps(entries), encoding="utf-8")
    again = (f"--in_json={tmp_path / 'changed.json'}", "--resume=latest", "--max_train_steps=2")
    capsys.readouterr()
    assert made.run(*again) == 2
    said = capsys.readouterr().err
    assert "since the state was saved this has changed" in said
    assert named in said
    assert "--resume_anyway" in said
