"""Captions by machine for some images: a script of finetune/ in a process of its kind, and its texts as proposals."""

import logging
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.captions.draws import Encoder
from library.config.errors import UserError
from library.editing.caption_set import Member
from studio.options import MachineOptions

log = logging.getLogger(__name__)

FINETUNE = Path(__file__).resolve().parents[1] / "finetune"
_SECONDS_BETWEEN_NEWS = 0.3
_ENDING = ".proposed"


@dataclass(frozen=True)
class Machine:
    """A script that captions a folder, and the encoder that its texts are for."""

    kind: str
    encoder: Encoder
    command: Sequence[str]


@dataclass
class Job:
    """One run of a machine over some images; `texts` are there once it is over."""

    machine: Machine
    members: Mapping[str, Member]
    texts: dict[Member, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    is_cancelled: bool = False


def machines_of(options: MachineOptions) -> dict[str, Machine]:
    """Return the machines that the command line offers, by kind."""
    found = []
    if options.tagger_model is not None:
        script = str(FINETUNE / "tag_images_by_wd14_tagger.py")
        found.append(Machine("tags", "l", [script, f"--model_dir={options.tagger_model}"]))
    if options.captioner_model is not None:
        script = str(FINETUNE / "make_captions.py")
        prompt = [] if options.captioner_prompt is None else [f"--prompt={options.captioner_prompt}"]
        found.append(Machine("sentences", "g", [script, f"--model_name_or_path={options.captioner_model}", *prompt]))
    return {each.kind: each for each in found}


class Machines:
    """Runs one job at a time in a thread; `tell(**facts)` is called with how far it is, and with what became of it."""

    def __init__(self, options: MachineOptions, tell: Callable[..., None]):
        self.offered = machines_of(options)
        self.job: Job | None = None
        self._tell = tell
        self._lock = threading.Lock()
        self._is_running = False

    def start(self, kind: str, members: Sequence[Member]) -> None:
        """Begin a job. Raise `UserError` if there is no such machine, nothing to do, or another job."""
        if kind not in self.offered:
            raise UserError(
                "there is no such machine here.", "Start the studio with --tagger_model or --captioner_model."
            )
        if not members:
            raise UserError("there are no images to caption.", "Select some, or show others.")
        with self._lock:
            if self._is_running:
                raise UserError("captions are being made already.", "Wait for them, or cancel.")
            self._is_running = True
        names = {f"{member.number}{member.image.suffix}": member for member in members}
        self.job = Job(self.offered[kind], names)
        threading.Thread(target=self._run, args=[self.job], name="captions by machine", daemon=True).start()

    def cancel(self) -> None:
        """End the job that runs, if one does; nothing was written by it."""
        job = self.job
        if job is not None and self._is_running:
            job.is_cancelled = True
            if job.process is not None:
                job.process.terminate()

    def _run(self, job: Job) -> None:
        problem: str | None = None
        try:
            with tempfile.TemporaryDirectory(prefix="studio-captions-") as folder:
                problem = self._caption(job, Path(folder))
        except OSError as error:
            problem = f"cannot caption: {error.strerror or error}."
        self._is_running = False
        facts = self.facts(job)
        self._tell(**facts, is_over=True, problem="cancelled" if job.is_cancelled else problem)

    def _caption(self, job: Job, folder: Path) -> str | None:
        """Run the script over links to the images; return what went wrong."""
        for name, member in job.members.items():
            _link(member.image, folder / name)
        log_file = folder / "messages.log"
        command = [sys.executable, job.machine.command[0], str(folder), *job.machine.command[1:]]
        with log_file.open("w", encoding="utf-8") as messages:
            job.process = subprocess.Popen(
                [*command, f"--caption_extension={_ENDING}"], stdout=messages, stderr=subprocess.STDOUT, text=True
            )
            while job.process.poll() is None and not job.is_cancelled:
                try:
                    job.process.wait(_SECONDS_BETWEEN_NEWS)
                except subprocess.TimeoutExpired:
                    self._tell(**self.facts(job, sum(1 for _ in folder.glob(f"*{_ENDING}"))), is_over=False)
            if job.is_cancelled:
                job.process.terminate()
            job.process.wait()
        for name, member in job.members.items():
            proposed = (folder / name).with_suffix(_ENDING)
            if proposed.is_file():
                job.texts[member] = " ".join(proposed.read_text(encoding="utf-8").split("\n")).strip()
        lines = log_file.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        return None if job.process.returncode == 0 else (errors or lines or ["the script has ended"])[-1]

    def facts(self, job: Job, done: int | None = None) -> dict[str, Any]:
        """Return how far a job is, as JSON."""
        done = len(job.texts) if done is None else done
        return {"machine": job.machine.kind, "done": done, "total": len(job.members)}


def _link(image: Path, place: Path) -> None:
    """Make the image appear at another place: as a link, or where there are none, as a copy."""
    try:
        place.symlink_to(image.absolute())
    except OSError:
        shutil.copyfile(image, place)
