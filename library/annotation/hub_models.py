"""The files of a model: those of a local folder, or of the hub if the user names a model of it."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from library.config.errors import UserError, first_line

log = logging.getLogger(__name__)

MODEL_FILE, LABEL_FILE = "model.onnx", "selected_tags.csv"


def tagger_files(model_dir: Path, repo_id: str | None, *, force_download: bool) -> tuple[Path, Path]:
    """Return model and labels of a tagger.

    They are in `model_dir`, or for a model of the hub in a folder of its name in there, as sd-scripts lays them down;
    what is missing is downloaded. Raise `UserError` if they are not there and cannot be fetched.
    """
    if repo_id is None:
        if not (model_dir / MODEL_FILE).is_file():
            raise UserError(
                f"there is no {MODEL_FILE} in '{model_dir}'.",
                "Name the folder of a tagger with --model_dir, or a model of the hub to download with --repo_id, such "
                "as SmilingWolf/wd-vit-tagger-v3.",
            )
        return model_dir / MODEL_FILE, model_dir / LABEL_FILE
    folder = model_dir / repo_id.replace("/", "_")
    missing = [name for name in (LABEL_FILE, MODEL_FILE) if force_download or not (folder / name).is_file()]
    if missing:
        log.info("downloading %s of '%s' to '%s'", " and ".join(missing), repo_id, folder)
        download(repo_id, missing, folder, force=force_download)
    return folder / MODEL_FILE, folder / LABEL_FILE


def download(repo_id: str, names: Sequence[str], folder: Path, *, force: bool) -> None:
    """Download files of a model of the hub into a folder. Raise `UserError` without a network or without the model."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT") or None
    for name in names:
        try:
            hf_hub_download(repo_id, name, local_dir=folder, force_download=force, endpoint=endpoint)
        except (HFValidationError, HfHubHTTPError) as error:
            raise UserError(
                f"the hub has no file '{name}' of a model '{repo_id}' ({first_line(error)}).",
                "Check --repo_id; a tagger has model.onnx and selected_tags.csv.",
            ) from error
        except (LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"'{repo_id}' is not on this machine and cannot be downloaded: the hub does not answer, or '{folder}' "
                f"cannot be written.",
                f"Check the network, or copy {MODEL_FILE} and {LABEL_FILE} into a folder and name it with --model_dir.",
            ) from error
