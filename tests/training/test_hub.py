"""Uploads to a hub that fails at random, what is found before training, and a state that comes from there."""

import json
import re
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import _http
from safetensors.torch import load_file

import sdxl_train
from library.config.errors import UserError
from library.config.messages import start_logging
from library.config.options import problems_of
from library.training import hub, uploads
from library.training.hub import Hub
from library.training.hub_options import HubOptions, HubPlace
from library.training.run_record import RECORD_FOLDER
from library.training.uploads import Uploads
from tests.conftest import Run, forget_accelerator
from tests.hub_server import OWNER, TOKEN, HubServer

REPOSITORY = f"{OWNER}/my-model"


class NoWait:
    """A `time` that does not sleep, for the client's own pauses."""

    @staticmethod
    def sleep(seconds: float) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    """`server(failing)` is a hub that the environment names, reached without long pauses."""
    started: list[HubServer] = []

    def start(failing: float = 0.0) -> HubServer:
        made = HubServer(failing, seed=1).__enter__()
        started.append(made)
        monkeypatch.setenv("HF_ENDPOINT", made.address)
        return made

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # another protocol, in Rust
    monkeypatch.setattr(_http, "time", NoWait)
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(uploads, "LONGEST_PAUSE", 0.02)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "no such file")
    yield start
    for each in started:
        each.__exit__()
    start_logging()  # on the console again


def options(**more) -> HubOptions:
    return HubOptions(**{"huggingface_repo_id": REPOSITORY, "huggingface_token": TOKEN, **more})


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # many attempts at many files
def test_a_run_with_a_hub_that_fails_at_random_ends_well_with_everything_uploaded_and_no_token_anywhere(
    train, server, capfd, tmp_path: Path
):
    with_failures = server(failing=0.4)
    flags = [
        *(f"--huggingface_repo_id={REPOSITORY}", f"--huggingface_token={TOKEN}", "--huggingface_path_in_repo=runs/one"),
        *("--async_upload", "--save_state_to_huggingface", "--save_every_n_steps=1", "--save_state", "--log_config"),
        f"--console_log_file={tmp_path / 'messages.txt'}",
    ]
    uploads.ATTEMPTS_AT_END, before = 60, uploads.ATTEMPTS_AT_END
    try:
        run: Run = train("--max_train_steps=2", *flags)
    finally:
        uploads.ATTEMPTS_AT_END = before
    assert with_failures.num_failures > 0
    files = with_failures.files[REPOSITORY]
    saved = [path.relative_to(run.output) for path in run.output.rglob("*") if path.is_file()]
    expected = {f"runs/one/{path}" for path in saved if path.parts[0] != RECORD_FOLDER}  # that tells of this machine
    assert files.keys() == expected
    assert all(files[f"runs/one/{path}"] == (run.output / path).read_bytes() for path in ("m.safetensors",))
    assert with_failures.private == {REPOSITORY: True}
    said = capfd.readouterr().out + (tmp_path / "messages.txt").read_text(encoding="utf-8")
    assert TOKEN not in said
    assert "signature" not in said
    written = [path for folder in (run.output, run.logs) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    [logged] = run.logs.rglob("hparams.yml")
    config = logged.read_text(encoding="utf-8")
    assert "optimizer_type: torch.optim.SGD" in config
    assert str(run.output.parent) not in config
    assert run.logged("images_seen") == [1, 2]
    assert re.search(r"2 steps in 0:\d\d:\d\d: 2 images seen, \S+ images a second\n  last loss \d", said)
    assert f"wrote '{run.output / 'm-step00000001.safetensors'}'" in said
    assert "to train longer: the same command with --resume latest" in said
    with_failures.failing = 0.0
    _resumed_from_the_hub(run, tmp_path)


def _resumed_from_the_hub(run: Run, tmp_path: Path) -> None:
    """Continue after step 1 in an empty folder, and arrive where the run did; then find the newest state."""
    elsewhere = tmp_path / "elsewhere"
    argv = [*run.argv, "--max_train_steps=2", f"--output_dir={elsewhere}", f"--huggingface_token={TOKEN}"]
    state = f"{REPOSITORY}/runs/one/m-step00000001-state"
    forget_accelerator()
    assert sdxl_train.main([*argv, f"--resume={state}", "--resume_from_huggingface"]) == 0
    weights = load_file(elsewhere / "m.safetensors")
    assert all(torch.equal(weights[name], expected) for name, expected in run.weights().items())
    newest = hub_state_of("latest", elsewhere)
    assert newest.name == "m-state"
    assert {path.name for path in newest.iterdir()} == {path.name for path in (run.output / "m-state").iterdir()}


def hub_state_of(resume: str, output: Path) -> Path:
    from library.training.hub_state import fetch_state

    return fetch_state(resume, options(huggingface_path_in_repo="runs/one"), output, "m")


# -- found before training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"huggingface_token": "hf_wrong"}, "the token is not accepted"),
        ({"huggingface_repo_id": "bob/model"}, "the token may not write there"),
        ({"huggingface_token": None}, "there is no token"),
    ],
)
def test_a_wrong_repository_or_token_is_found_before_training(more, problem, server):
    server()
    with pytest.raises(UserError, match=problem) as caught:
        Hub(options(**more)).require_repository()
    assert "hf_wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"huggingface_repo_id": "my-model"}, "--huggingface_repo_id is 'my-model'; it must be owner/name"),
        ({"huggingface_repo_id": None, "huggingface_token": None, "async_upload": True}, "--async_upload needs"),
        ({"huggingface_repo_id": None}, "--huggingface_token needs --huggingface_repo_id"),
        ({"huggingface_path_in_repo": "../up"}, "--huggingface_path_in_repo is '../up'"),
        ({"huggingface_path_in_repo": "a\\b"}, "--huggingface_path_in_repo is"),
    ],
)
def test_each_mistake_is_one_sentence(more, problem):
    [found] = problems_of(options(**more))
    assert found.startswith(problem)


def test_without_a_network_it_is_said_and_the_run_begins(server, caplog, monkeypatch):
    server()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    Hub(options()).require_repository()
    assert "the hub cannot be reached now" in caplog.text


@pytest.mark.parametrize(
    ("more", "resume", "has_states", "problem"),
    [
        ({"save_state_to_huggingface": True}, None, False, "--save_state_to_huggingface needs states"),
        ({"resume_from_huggingface": True}, None, True, "--resume_from_huggingface needs --resume"),
        ({"resume_from_huggingface": True}, "m-state", True, "--resume is 'm-state', which names no state on the hub."),
        (
            {"resume_from_huggingface": True, "huggingface_repo_id": None},
            "latest",
            True,
            "--resume latest with --resume_from_huggingface needs --huggingface_repo_id.",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(more, resume, has_states, problem):
    [found] = options(**more).conflicts(resume, has_states=has_states)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("resume", "place"),
    [
        ("a/b/c", HubPlace("a/b", "c")),
        ("a/b/c/d-state:v1", HubPlace("a/b", "c/d-state", "v1")),
        ("a/b/c:v1:dataset", HubPlace("a/b", "c", "v1", "dataset")),
        ("latest", None),
    ],
)
def test_a_state_on_the_hub_is_named_as_in_the_reference(resume, place):
    assert options().place_of_state(resume) == place


@pytest.mark.parametrize("resume", ["a/b", "C:\\states\\m-state", "a/b/c:v:w:x", "a/b/c:v:film", "m-state"])
def test_what_names_no_state_on_the_hub_is_refused(resume):
    with pytest.raises(UserError, match="names no state on the hub"):
        options().place_of_state(resume)


def test_a_state_that_is_not_there_is_named(server, tmp_path: Path):
    made = server()
    made.files[REPOSITORY] = {"m-state/other.txt": b"", "x-state/progress.json": json.dumps(PROGRESS).encode()}
    with pytest.raises(UserError, match="cannot be fetched from the hub"):
        hub_state_of(f"{REPOSITORY}/no-state", tmp_path)
    with pytest.raises(UserError, match="holds no state of a run with the same --output_name"):
        hub_state_of("latest", tmp_path)
    assert list(tmp_path.iterdir()) == []


PROGRESS = {"num_states": 1, "started": "", "step": 1, "setting": {"options": {"output_name": "x"}}}


# -- the queue --------------------------------------------------------------------------------------------------------


class Destination:
    """A hub that answers as it is told, one answer an attempt; then everything succeeds."""

    def __init__(self, *answers: Exception | None):
        self.answers = list(answers)
        self.attempts: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def make_repository(self) -> None:
        pass

    def upload(self, path: Path) -> None:
        self.attempts.append(path.name)
        self.may_go_on.wait()
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer

    def is_final(self, error: Exception) -> bool:
        return isinstance(error, PermissionError)

    def reason(self, error: Exception) -> str:
        return str(error)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(uploads, "LONGEST_PAUSE", 0.002)


def saved(folder: Path, name: str) -> Path:
    (folder / name).write_text("a model", encoding="utf-8")
    return folder / name


def test_a_failure_is_said_once_and_tried_again(tmp_path: Path, quick, caplog):
    queue = Uploads(options(), Destination(OSError("no network"), OSError("no network")))
    queue.add(saved(tmp_path, "a"))
    queue.finish()
    assert queue.uploaded == [tmp_path / "a"]
    assert queue.failed == {}
    assert len([said for said in caplog.messages if "is not uploaded yet (no network)" in said]) == 1


def test_what_is_refused_for_good_is_named_with_the_command_that_uploads_it(tmp_path: Path, quick, caplog):
    destination = Destination(PermissionError("quota"))
    queue = Uploads(options(huggingface_path_in_repo="x", huggingface_repo_type="dataset"), destination)
    queue.add(saved(tmp_path, "a"))
    queue.add(saved(tmp_path, "b"))
    queue.finish()
    assert (queue.uploaded, queue.failed) == ([tmp_path / "b"], {tmp_path / "a": "quota"})
    assert f'hf upload {REPOSITORY} "{tmp_path / "a"}" "x/a" --repo-type dataset' in caplog.text


def test_at_the_end_the_attempts_are_few_and_what_is_left_is_named(tmp_path: Path, quick, caplog):
    destination = Destination(*[OSError("no network")] * 1000)
    queue = Uploads(options(async_upload=True), destination)
    queue.add(saved(tmp_path, "a"))
    queue.finish()
    assert queue.failed == {tmp_path / "a": "no network"}
    assert (tmp_path / "a").exists()
    assert re.search(r"'.*a' is not uploaded \(no network\)", caplog.text)


def test_training_goes_on_while_a_file_is_uploaded_only_with_async_upload(tmp_path: Path, quick):
    destination = Destination()
    destination.may_go_on.clear()
    queue = Uploads(options(async_upload=True), destination)
    queue.add(saved(tmp_path, "a"))  # returns although nothing is uploaded yet
    assert queue.uploaded == []
    destination.may_go_on.set()
    queue.finish()
    waits = Uploads(options(), Destination())
    waits.add(saved(tmp_path, "b"))
    assert waits.uploaded == [tmp_path / "b"]
    waits.finish()


def test_a_file_that_was_removed_or_replaced_meanwhile_is_no_failure(tmp_path: Path, quick, caplog):
    destination = Destination(None, OSError("gone"))
    destination.may_go_on.clear()
    queue = Uploads(options(async_upload=True), destination)
    for name in ("first", "removed"):
        queue.add(saved(tmp_path, name))
    queue.add(saved(tmp_path, "twice"))
    queue.add(saved(tmp_path, "twice"))  # waits already: its newest content will be read
    (tmp_path / "removed").unlink()
    destination.may_go_on.set()
    queue.finish()
    assert queue.uploaded == [tmp_path / "first", tmp_path / "twice"]
    assert queue.failed == {}
    assert "'removed' was removed before it was uploaded" in caplog.text


def test_states_are_uploaded_only_if_asked_for(tmp_path: Path, quick):
    state = tmp_path / "m-state"
    state.mkdir()
    for is_asked in (False, True):
        queue = Uploads(options(save_state_to_huggingface=is_asked), Destination())
        queue.add(state)
        queue.finish()
        assert queue.uploaded == [state] * is_asked


def test_a_signal_ends_the_wait_and_what_is_left_is_named(tmp_path: Path, quick, caplog):
    def interrupted():
        raise SystemExit(130)

    destination = Destination()
    destination.may_go_on.clear()
    queue = Uploads(options(async_upload=True), destination)
    queue.add(saved(tmp_path, "a"))
    queue._changed.wait_for = lambda *arguments: interrupted()
    with pytest.raises(SystemExit):
        queue.finish()
    assert queue.failed == {tmp_path / "a": "the run ended before"}
    destination.may_go_on.set()


def test_reasons_hold_neither_the_token_nor_signatures(server):
    server()
    reason = Hub(options()).reason(OSError(f"cannot reach http://x/y?token={TOKEN}&s=1 with {TOKEN}"))
    assert reason == "cannot reach http://x/y with (token)"
    assert hub.status_of(OSError()) is None
