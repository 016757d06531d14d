"""A state from the hub: found, downloaded into the output folder, and resumed like any other."""

import json
import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from accelerate.utils import broadcast_object_list

from library.config.atomic_files import replacing_folder
from library.config.errors import UserError, listed
from library.training.accelerator import make_accelerator_of
from library.training.distribution import wait_for_main
from library.training.hub import Hub
from library.training.hub_options import HubOptions, HubPlace
from library.training.progress import LATEST, PROGRESS_FILE, STATE_SUFFIX, read_record
from library.training.run_options import TrainingOptions

log = logging.getLogger(__name__)


def take_state_from_hub(options: TrainingOptions) -> TrainingOptions:
    """Return the options with the folder of a downloaded state as `--resume`, where it is to come from the hub.

    The main process downloads. Raise as `fetch_state`.
    """
    if not options.hub.resume_from_huggingface:
        return options
    accelerator = make_accelerator_of(options)
    folder = [""]
    if accelerator.is_main_process:
        resume = str(options.resume.resume)
        folder = [str(fetch_state(resume, options.hub, options.output_dir, options.save.output_name))]
    wait_for_main(accelerator)
    broadcast_object_list(folder)
    return replace(options, resume=replace(options.resume, resume=folder[0]))


def fetch_state(resume: str, options: HubOptions, output_dir: Path, output_name: str | None) -> Path:
    """Return the folder of the state that `--resume` names on the hub, downloaded into `output_dir`.

    What is there already, byte for byte the same, is not downloaded again. Raise `UserError` if there is no such state,
    or if the hub cannot be reached.
    """
    place = options.place_of_state(resume)
    hub = Hub(options)
    try:
        place = place or _newest(hub, options.place_of(), output_name)
        with tempfile.TemporaryDirectory() as scratch:
            record = _download(hub, place, Path(scratch), f"{place.path}/{PROGRESS_FILE}")
            return _fetch(hub, place, record, output_dir / Path(place.path).name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the state '{resume}' cannot be fetched from the hub: {hub.reason(error)}.",
            "Check --resume, the token and the network, or download the folder with 'hf download' and pass it as "
            "--resume without --resume_from_huggingface.",
        ) from error


def _fetch(hub: Hub, place: HubPlace, record: bytes, folder: Path) -> Path:
    """Download a state into `folder` unless it is there; `record` is the content of its progress file."""
    if (folder / PROGRESS_FILE).is_file() and (folder / PROGRESS_FILE).read_bytes() == record:
        read_record(folder)
        log.info("'%s' is already the state '%s'", folder, place)
        return folder
    log.info("downloading the state '%s' into '%s'", place, folder)
    with replacing_folder(folder, marker=PROGRESS_FILE) as unfinished:
        hub.api.snapshot_download(
            place.repository,
            repo_type=place.kind,
            revision=place.revision,
            allow_patterns=f"{place.path}/*",
            local_dir=unfinished,
        )
        for path in sorted((unfinished / place.path).iterdir()):
            path.rename(unfinished / path.name)
        shutil.rmtree(unfinished / Path(place.path).parts[0])
        shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # the client's notes
        read_record(unfinished)
    return folder


def _newest(hub: Hub, place: HubPlace, output_name: str | None) -> HubPlace:
    """Return the newest state of `output_name` in a folder of the repository, as `--resume latest` chooses it."""
    found: dict[tuple[int, str, int], HubPlace] = {}
    names = []
    for path in _folders(hub, place):
        if not path.endswith(STATE_SUFFIX):
            continue
        names.append(path)
        state = place._replace(path=path)
        with tempfile.TemporaryDirectory() as scratch:
            content = json.loads(_download(hub, state, Path(scratch), f"{path}/{PROGRESS_FILE}"))
        if content["setting"]["options"].get("output_name", str(output_name)) == str(output_name):
            found[content["num_states"], content["started"], content["step"]] = state
    if not found:
        others = f"; it holds {listed(names)}" if names else ""
        raise UserError(
            f"--resume {LATEST}: '{place}' holds no state of a run with the same --output_name{others}.",
            "Train with --save_state and --save_state_to_huggingface first, or name the folder of a state.",
        )
    return found[max(found)]


def _folders(hub: Hub, place: HubPlace) -> list[str]:
    entries = hub.api.list_repo_tree(
        place.repository, place.path or None, revision=place.revision, repo_type=place.kind
    )
    return [entry.path for entry in entries if type(entry).__name__ == "RepoFolder"]


def _download(hub: Hub, place: HubPlace, folder: Path, path: str) -> bytes:
    file = hub.api.hf_hub_download(
        place.repository, path, repo_type=place.kind, revision=place.revision, local_dir=folder
    )
    return Path(file).read_bytes()
