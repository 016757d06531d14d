"""Set up this checkout and try it, with nothing but Python.

python quickstart.py demo                     install, then run the whole workflow on a tiny model
python quickstart.py test [pytest arguments]  install, then run the tests
python quickstart.py install                  only install: the scripts, and the tools of the tests

Everything goes into a virtual environment: .venv beside this file, or the folder that --venv or SDXL_VENV names.
"""

from __future__ import annotations  # so that an old Python gets as far as the message about its version

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 11)
REQUIREMENTS = ROOT / "requirements.txt"
DEV_REQUIREMENTS = ROOT / "requirements-dev.txt"

DEMO_FOLDER = Path("demo/output/my set")
DEMO_MODEL = "demo/tiny_sdxl.safetensors"
QUIET_LAUNCH = ("--quiet", "--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
"""What `accelerate launch` is told so that it prints nothing: it lists each value that it had to assume."""


class QuickstartError(Exception):
    """An error to report to the user, with the exit status."""

    def __init__(self, message: str, exit_status: int = 2):
        super().__init__(message)
        self.exit_status = exit_status


# -- the virtual environment ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """A virtual environment: a folder with its Python and packages."""

    folder: Path

    @property
    def programs(self) -> Path:
        """The folder of its programs."""
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    def program(self, name: str) -> Path:
        """Return the file of one of its programs."""
        return self.programs / (f"{name}.exe" if os.name == "nt" else name)

    @property
    def is_whole(self) -> bool:
        """Whether it has a Python with pip, which an interrupted creation leaves out."""
        command = [str(self.program("python")), "-c", "import pip"]
        return self.program("python").exists() and subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0

    def stamp(self, requirements: Path) -> Path:
        """Return the file that records, by `fingerprint`, which state of a requirements file is installed."""
        return self.folder / f"{requirements.stem}.installed"

    def variables(self) -> dict[str, str]:
        """Return the environment variables of a shell in which it is activated."""
        variables = {**os.environ, "VIRTUAL_ENV": str(self.folder)}
        variables["PATH"] = os.pathsep.join([str(self.programs), os.environ.get("PATH", "")])
        variables.pop("PYTHONHOME", None)
        # The tiny model of demo and tests gains nothing from threads. On busy cores it runs ten times slower with them:
        # each of its thousand small operations waits for the slowest thread.
        variables.setdefault("OMP_NUM_THREADS", "1")
        return variables


def fingerprint(requirements: Path) -> str:
    """Return a digest of a requirements file and of those beside it (they include one another)."""
    texts = [path.read_bytes() for path in sorted(requirements.parent.glob("requirements*.txt"))]
    return hashlib.sha256(b"\0".join([requirements.name.encode(), *texts])).hexdigest()


def install(environment: Environment, requirements: Path) -> None:
    """Install the requirements into the environment, unless they are installed already.

    The stamp is written last: an interrupted installation continues the next time.
    """
    stamp = environment.stamp(requirements)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == fingerprint(requirements):
        return
    print(f"Installing into '{environment.folder}'. It takes about 6 GB, most of it PyTorch, and is done only once.")
    if not environment.is_whole:
        require_own_folder(environment.folder)
        run([sys.executable, "-m", "venv", str(environment.folder)])
    run(["python", "-m", "pip", "install", "--disable-pip-version-check", "-r", str(requirements)], environment)
    stamp.write_text(fingerprint(requirements), encoding="utf-8")


def require_own_folder(folder: Path) -> None:
    """Raise `QuickstartError` if the folder is neither a virtual environment nor empty."""
    if folder.exists() and not (folder / "pyvenv.cfg").is_file() and any(folder.iterdir()):
        raise QuickstartError(f"'{folder}' is not a virtual environment. Choose a new or an empty folder with --venv.")


def run(command: list[str], environment: Environment | None = None) -> None:
    """Print a command and run it in the checkout, as if the environment were activated.

    Raise `QuickstartError`, with the command and its exit status, if that is not 0.
    """
    print(f"\n> {shown(command)}", flush=True)
    command_line, variables = command, None
    if environment is not None:
        command_line, variables = [str(environment.program(command[0])), *command[1:]], environment.variables()
    status = subprocess.run(command_line, cwd=ROOT, env=variables).returncode
    if status != 0:
        raise QuickstartError(f"this command ended with exit status {status}:\n  {shown(command)}", status)


def shown(command: list[str]) -> str:
    """Return the command as typed in a shell, of Windows or of another system."""
    return " ".join(re.sub(r"^(--\w+=)?(.* .*)$", r'\1"\2"', word) for word in command)


# -- the demo ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoSize:
    """The amount of drawing, training and measuring in a demo."""

    num_steps: int = 320
    num_pictures: int = 96
    prompts: str = "demo/prompt.txt"
    scenes_per_pair: int = 5


def demo_commands(folder: Path, size: DemoSize) -> list[list[str]]:
    """Return the commands that draw the images, the four of the workflow, and those that show its result."""
    my_set = folder.as_posix()
    sampling = ["--seed=0", f"--sample_prompts={size.prompts}", f"--sample_every_n_steps={max(1, size.num_steps // 4)}"]
    measuring = [f"--scenes_per_pair={size.scenes_per_pair}", f"--save={my_set}/figures.txt"]
    return [
        ["python", "demo/pictures.py", f"{my_set}/images", f"--num_pictures={size.num_pictures}"],
        *workflow_commands(folder, size.num_steps, [*sampling, "--sample_sampler=euler_a", "--sample_grid"]),
        ["python", "finetune/contact_sheet.py", f"{my_set}/output/sample", f"--output={my_set}/contact_sheet.png"],
        ["python", "finetune/run_report.py", f"{my_set}/output", f"--output={my_set}/run_report.html"],
        ["python", "demo/figures.py", DEMO_MODEL, f"{my_set}/output/finetuned_model.safetensors", *measuring],
    ]


def workflow_commands(folder: Path, num_steps: int, more_flags: list[str]) -> list[list[str]]:
    """Return the four commands of the workflow, for images and captions in `folder`/images; the last one trains."""
    my_set = folder.as_posix()
    images, meta_cap, meta_lat = f"{my_set}/images", f"{my_set}/meta_cap.json", f"{my_set}/meta_lat.json"
    buckets = ["--min_bucket_reso=64", "--max_bucket_reso=128", "--bucket_reso_steps=32"]
    return [
        ["python", "finetune/sdxl_merge_captions_g_to_metadata.py", images, meta_cap],
        ["python", "finetune/sdxl_merge_captions_l_to_metadata.py", images, meta_cap],
        [
            *["python", "finetune/prepare_buckets_latents.py", images, meta_cap, meta_lat, DEMO_MODEL],
            *["--batch_size", "1", "--max_resolution=96,96", *buckets],
        ],
        [
            *["accelerate", "launch", *QUIET_LAUNCH, "--num_cpu_threads_per_process=1", "./sdxl_train.py"],
            *[f"--pretrained_model_name_or_path={DEMO_MODEL}", "--in_json", meta_lat, f"--train_data_dir={images}"],
            *["--resolution=96,96", *buckets, f"--output_dir={my_set}/output", f"--logging_dir={my_set}/logs"],
            *["--save_model_as=safetensors", "--output_name=finetuned_model", "--save_precision=fp16"],
            *["--max_data_loader_n_workers=0", "--train_batch_size=16", f"--max_train_steps={num_steps}"],
            *["--cache_latents", "--cache_latents_to_disk", "--optimizer_type=AdamW", "--optimizer_args", "fused=True"],
            *["--learning_rate=1e-3", "--lr_scheduler=cosine", "--lr_warmup_steps=0.1"],
            # L learns the styles, at half the rate: at a higher one its words change more of the content. G knows the
            # shapes already.
            *["--train_text_encoder", "--learning_rate_te1=5e-4", "--learning_rate_te2=0"],
            # Outside of these timesteps a style is either plain to see or drowned in noise: nothing to learn.
            *["--min_timestep=100", "--max_timestep=900", *more_flags],
        ],
    ]


def run_demo(environment: Environment, folder: Path, size: DemoSize) -> None:
    """Run the whole workflow in `folder`, from drawing the images to the finished checkpoint."""
    started = time.monotonic()
    set_aside(ROOT / folder)
    for command in demo_commands(folder, size):
        run(command, environment)
    print(demo_report(environment, folder, seconds=time.monotonic() - started))


def set_aside(folder: Path) -> None:
    """Rename the folder of an earlier demo, which may hold work of the user by now, to a name that nothing has."""
    if not folder.exists():
        return
    names = (folder.with_name(f"{folder.name} ({number})") for number in count(1))
    kept = next(path for path in names if not path.exists())
    try:
        folder.rename(kept)
    except OSError as error:
        raise QuickstartError(
            f"cannot rename '{folder}' of an earlier demo: {error.strerror}. Close what uses it (TensorBoard?)."
        ) from error
    print(f"The earlier demo is kept as '{kept}'. Remove it if you do not need it.")


def demo_report(environment: Environment, folder: Path, seconds: float) -> str:
    """Return the text that tells where all files are, and which to look at."""
    my_set = folder.as_posix()
    grids = sorted(path.name for path in (ROOT / folder / "output" / "sample").glob("*_grid.png"))
    before_and_after = f"\n{' ' * 25}".join(f"{my_set}/output/sample/{name}" for name in grids)
    tensorboard = shown([str(environment.program("tensorboard")), "--logdir", f"{my_set}/logs"])
    return f"""
The demo finished in {seconds:.0f} seconds. Look at these first:

  contact sheet          {my_set}/contact_sheet.png
                         each sample prompt, from before the first step to the last
  report                 {my_set}/run_report.html
                         the run on one page: curves, samples, options
  grid before, after     {before_and_after}
                         each L prompt with each G prompt
  figures                {my_set}/figures.txt

Other files:

  images and captions    {my_set}/images
  metadata               {my_set}/meta_cap.json, {my_set}/meta_lat.json
  samples                {my_set}/output/sample
  checkpoint             {my_set}/output/finetuned_model.safetensors
  logs                   {my_set}/logs
                         show them with: {tensorboard}

The tiny model has SDXL's structure, and was trained on drawn shapes only. docs/separate-captions.md explains how
to read the grids. With a real SDXL checkpoint the same commands train a real model: see README.md."""


# -- the commands -----------------------------------------------------------------------------------------------------


def require_python(version: tuple[int, ...]) -> None:
    """Raise `QuickstartError` for a Python that is too old."""
    if version[:2] < OLDEST_PYTHON:
        wanted, found = (".".join(map(str, numbers)) for numbers in (OLDEST_PYTHON, version))
        raise QuickstartError(
            f"this project needs Python {wanted} or newer, and this is Python {found} ('{sys.executable}').\n"
            f"Install one from https://www.python.org/downloads/ and start again with it, for example:"
            f" python{wanted} quickstart.py demo"
        )


def run_tests(environment: Environment, arguments: list[str]) -> int:
    """Run pytest and return its exit status. At most four processes, since each of them imports torch."""
    num_processes = min(4, os.cpu_count() or 1)
    command = ["python", "-m", "pytest", f"--numprocesses={num_processes}", "--dist=worksteal", *arguments]
    try:
        run(command, environment)
    except QuickstartError as error:
        return error.exit_status  # pytest has reported it
    return 0


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the parsed arguments, and those for pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=["demo", "test", "install"])
    default = os.environ.get("SDXL_VENV") or ROOT / ".venv"
    parser.add_argument("--venv", type=Path, default=Path(default), help="folder of the virtual environment")
    arguments, for_pytest = parser.parse_known_args(argv)
    if for_pytest and arguments.command != "test":
        parser.error(f"unexpected arguments: {shown(for_pytest)}")
    return arguments, for_pytest


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    try:
        require_python(sys.version_info[:3])
        arguments, for_pytest = parse_arguments(argv)
        environment = Environment(arguments.venv.absolute())
        install(environment, REQUIREMENTS if arguments.command == "demo" else DEV_REQUIREMENTS)
        if arguments.command == "demo":
            run_demo(environment, DEMO_FOLDER, DemoSize())
        elif arguments.command == "test":
            return run_tests(environment, for_pytest)
    except QuickstartError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
