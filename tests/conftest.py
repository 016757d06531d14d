"""What many tests share: the tiny SDXL, and pictures to train it on."""

import functools
import gc
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import skimage
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sdxl_train
from demo.random_sdxl import TINY, write_random_sdxl
from finetune import prepare_buckets_latents, sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata
from library.config.messages import start_logging
from library.optim import kernels
from library.samples.sampler import SamplingNetworks
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file

GOLDEN = Path("../shared/golden")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run_slow", action="store_true", help="run the tests that take minutes")


MARKS_OF_FIXTURES = {
    "trains": {"train", "train_in", "trainer", "_server", "workflow"},
    "heavy": {"tiny_sdxl", "classifier", "empty_environment"},
}
"""A test that uses one of these fixtures, directly or through another, has the mark. A quick run skips both marks."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark, fixtures in MARKS_OF_FIXTURES.items():
            if not fixtures.isdisjoint(getattr(item, "fixturenames", ())):
                item.add_marker(mark)
    if config.getoption("--run_slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: --run_slow"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Escape what is no UTF-8 in what a test logged: a process of a parallel run cannot send it."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def messages_on_the_console() -> None:
    """Library functions called without a script report as they do under one."""
    start_logging()


@pytest.fixture(scope="session", autouse=True)
def imported_objects_are_not_collected() -> Iterator[None]:
    """Leave the million objects of torch, diffusers and transformers out of each search for garbage: 7 % of a run."""
    gc.freeze()
    yield
    gc.unfreeze()  # or nanobind reports them as leaks when the process ends


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The folder of all recorded reference values; what must always be checked has a copy in tests/golden."""
    folder = Path(__file__).resolve().parents[1] / GOLDEN
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file of SDXL's skeleton in small widths and random weights, float16; not to be written to."""
    path = tmp_path_factory.mktemp("models") / "tiny_sdxl.safetensors"
    write_random_sdxl(path, TINY, torch.float16, seed=0)
    return path


@pytest.fixture(scope="session")
def browsed() -> Callable[[Path], str]:
    """`browsed(page)` returns the page as a browser has it after its scripts have run."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom")

    def dom(page: Path) -> str:
        command = [browser, *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return dom


# -- training runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedSet:
    """Three photographs as the scripts leave them: two in the bucket 128x128, one in 256x64. Not to be written to."""

    folder: Path

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def captions_json(self) -> Path:
        """The metadata after the merge scripts."""
        return self.folder / "meta_cap.json"

    @property
    def latents_json(self) -> Path:
        """The metadata after prepare_buckets_latents.py."""
        return self.folder / "meta_lat.json"

    def without_latents(self, folder: Path) -> "PreparedSet":
        """A copy in `folder` that only the merge scripts have seen."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("*.npz", "meta_lat.json"))
        return PreparedSet(folder)


def base_flags(model: Path | str, in_json: Path | str, images: Path | str, output: Path | str) -> list[str]:
    """Return the flags that every run of sdxl_train.py needs."""
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--in_json={in_json}",
        f"--train_data_dir={images}",
        f"--output_dir={output}",
    ]


BUCKET_FLAGS = ("--min_bucket_reso=64", "--max_bucket_reso=256", "--bucket_reso_steps=64")
PHOTOGRAPHS = {  # name: size, G caption, L caption
    "astronaut": ((140, 130), "a woman in a space suit", "official portrait"),
    "chelsea": ((130, 150), "a cat looks to the left", "close-up, soft light"),
    "coffee": ((240, 62), "a cup of coffee, a spoon", "still life"),
}


@pytest.fixture(scope="session")
def prepared_set(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """Photographs, captions, metadata and latents, made by the three scripts."""
    made = PreparedSet(tmp_path_factory.mktemp("sets") / "my set")
    made.images.mkdir(parents=True)
    for name, (size, caption_g, caption_l) in PHOTOGRAPHS.items():
        Image.fromarray(getattr(skimage.data, name)()).resize(size).save(made.images / f"{name}.jpg")
        (made.images / f"{name}.caption").write_text(caption_g, encoding="utf-8")
        (made.images / f"{name}.txt").write_text(caption_l, encoding="utf-8")
    merge_captions(made)
    argv = [made.images, made.captions_json, made.latents_json, tiny_sdxl, "--max_resolution=128,128", *BUCKET_FLAGS]
    assert prepare_buckets_latents.main([str(argument) for argument in argv]) == 0
    return made


def merge_captions(prepared: PreparedSet) -> None:
    """Run both merge scripts on the set."""
    for script in (sdxl_merge_captions_g_to_metadata, sdxl_merge_captions_l_to_metadata):
        assert script.main([str(prepared.images), str(prepared.captions_json)]) == 0


@dataclass(frozen=True)
class Run:
    """A finished training run; its model is called "m"."""

    argv: list[str]
    output: Path
    logs: Path

    def weights(self, name: str = "m") -> dict[str, torch.Tensor]:
        """The tensors of a saved model."""
        return load_file(self.output / f"{name}.safetensors")

    def events(self) -> EventAccumulator:
        """What TensorBoard shows of the run."""
        [folder] = self.logs.glob("*/finetuning")
        return EventAccumulator(str(folder)).Reload()

    def logged(self, name: str) -> list[float]:
        """The values of a curve, step by step."""
        return [event.value for event in self.events().Scalars(name)]


@pytest.fixture(scope="session")
def train(tiny_sdxl: Path, prepared_set: PreparedSet, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`train("--flag=value", ...)` runs sdxl_train.py to its end on the tiny SDXL and the prepared set.

    Flags given take the place of the defaults: seed 7, float32, one epoch of three steps, plain SGD without clipping,
    whose weights move by `RATE` times the gradient and so show every difference between two gradients in proportion.
    """

    def run(*flags: str) -> Run:
        folder = tmp_path_factory.mktemp("run")
        argv = [
            *base_flags(tiny_sdxl, prepared_set.latents_json, prepared_set.images, folder / "my output"),
            f"--logging_dir={folder / 'logs'}",
            *("--output_name=m", "--resolution=128,128", "--max_data_loader_n_workers=0", "--seed=7"),
            *("--max_train_steps=3", "--optimizer_type=torch.optim.SGD", f"--learning_rate={RATE}"),
            *("--max_grad_norm=0", *BUCKET_FLAGS, *flags),
        ]
        forget_accelerator()
        assert sdxl_train.main(argv) == 0
        return Run(argv, folder / "my output", folder / "logs")

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread: several share a product as memory happens to lie, and the last bit of a float32 follows that."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


RATE = 0.1


@pytest.fixture(scope="session")
def one_picture(prepared_set: PreparedSet, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag that narrows a run to one picture."""
    path = tmp_path_factory.mktemp("one") / "meta.json"
    entries = json.loads(prepared_set.latents_json.read_text(encoding="utf-8"))
    path.write_text(json.dumps({"astronaut": entries["astronaut"]}), encoding="utf-8")
    return f"--in_json={path}"


def forget_accelerator() -> None:
    """Let the next `Accelerator` of this process choose its precision: accelerate would keep the first one's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_accelerate() -> None:
    """For tests that make their own `Accelerator`."""
    forget_accelerator()


@pytest.fixture
def unet_inputs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Record the inputs of each call of the U-Net: sample, timestep, hidden, pooled, time_ids."""
    calls: list[dict[str, torch.Tensor]] = []
    forward = UNet2DConditionModel.forward

    @functools.wraps(forward)
    def recording(self, sample, timestep, encoder_hidden_states, added_cond_kwargs, **others):
        calls.append(
            {
                "sample": sample,
                "timestep": timestep,
                "hidden": encoder_hidden_states,
                "pooled": added_cond_kwargs["text_embeds"],
                "time_ids": added_cond_kwargs["time_ids"],
            }
        )
        return forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs, **others)

    monkeypatch.setattr(UNet2DConditionModel, "forward", recording)
    return calls


@pytest.fixture(scope="session")
def tiny_networks(tiny_sdxl: Path) -> SamplingNetworks:
    """The tiny SDXL's networks in float32, for drawing; not to be changed."""
    whole = torch.float32
    model = read_single_file(tiny_sdxl, ModelDtypes(unet=whole, vae=whole, text_encoder_l=whole, text_encoder_g=whole))
    return SamplingNetworks(model.unet, model.vae, model.text_encoder_l, model.text_encoder_g)


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """A machine on which `torch.compile` finds no C++ compiler."""
    caches = (kernels.why_not_compiled, kernels._can_compile)
    for cached in caches:
        cached.cache_clear()
    torch._dynamo.reset()  # it would run what it has compiled before
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        yield
    for cached in caches:
        cached.cache_clear()
