"""The flags of the Hugging Face Hub: where saved models and states are uploaded to, and where a state comes from."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

from library.config.errors import UserError
from library.config.file_names import text_problem
from library.config.options import option

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}")
REPOSITORY_TYPES = ("model", "dataset", "space")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_ONLY_WITH_A_REPOSITORY = (
    *("huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload"),
    "save_state_to_huggingface",
)


class HubPlace(NamedTuple):
    """A folder, or the root "", of a repository on the hub; `revision` None is its main branch."""

    repository: str
    path: str
    revision: str | None = None
    kind: str = "model"

    def __str__(self) -> str:
        return "/".join(filter(None, (self.repository, self.path))) + (f":{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class HubOptions:
    """Uploads to the Hugging Face Hub, and a state from there. HF_ENDPOINT names another server."""

    _argument_group_name: ClassVar[str] = "Hugging Face Hub"

    huggingface_repo_id: str | None = option(
        None, "Upload each saved model to this repository, owner/name. It is created if it does not exist."
    )
    huggingface_repo_type: str | None = option(
        None, "Type of the repository. Default: model.", choices=(*REPOSITORY_TYPES, None)
    )
    huggingface_path_in_repo: str | None = option(None, "Folder in the repository. Default: its root.")
    huggingface_token: str | None = option(
        None,
        "Access token with write permission. It is written to no file, but other users of the machine can see it in "
        "the list of processes: HF_TOKEN or 'hf auth login' keep it from them.",
        secret=True,
    )
    huggingface_repo_visibility: str | None = option(
        None, "Visibility of a repository that is created. Default: private.", choices=("public", "private", None)
    )
    async_upload: bool = option(
        False,
        "Upload while training continues. Without it training waits for each upload, though not for further attempts "
        "after one that fails.",
    )
    save_state_to_huggingface: bool = option(False, "Upload each saved state, too.")
    resume_from_huggingface: bool = option(
        False,
        "Download the state that --resume names: owner/name/folder, optionally with :revision or :revision:type. "
        "--resume=latest is the newest one of --output_name in --huggingface_repo_id.",
    )

    @property
    def kind(self) -> str:
        """The type of the repository."""
        return self.huggingface_repo_type or "model"

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        for each in fields(self):
            text = getattr(self, each.name)
            if isinstance(text, str) and (problem := text_problem(text)):
                yield f"--{each.name}: {problem}. Correct the text."
        repository = self.huggingface_repo_id
        if repository is None:
            given = [f"--{name}" for name in _ONLY_WITH_A_REPOSITORY if getattr(self, name)]
            if self.huggingface_token is not None and not self.resume_from_huggingface:
                given.append("--huggingface_token")
            if given:
                yield f"{given[0]} needs --huggingface_repo_id: name the repository, owner/name."
        elif not _REPOSITORY.fullmatch(repository):
            yield f"--huggingface_repo_id is '{repository}'; it must be owner/name, as in 'alice/my-model'."
        path = self.huggingface_path_in_repo or ""
        if "\\" in path or not all(part.strip(".") for part in path.strip("/").split("/") if path):
            yield f"--huggingface_path_in_repo is '{path}'; name folders separated by /, without dots alone."
        offline = next((name for name in _OFFLINE if os.environ.get(name, "0").lower() in ("1", "true", "yes")), None)
        if offline is not None and (repository is not None or self.resume_from_huggingface):
            yield f"the environment variable {offline} forbids what the hub is asked for: unset it."

    def conflicts(self, resume: str | None, *, has_states: bool) -> Iterator[str]:
        """Yield what is wrong beside `--resume`, and where states are saved or not, one sentence each."""
        if self.save_state_to_huggingface and not has_states:
            yield "--save_state_to_huggingface needs states: add --save_state, or --save_state_on_train_end."
        if not self.resume_from_huggingface:
            return
        if resume is None:
            yield "--resume_from_huggingface needs --resume: name the state, owner/name/folder."
            return
        try:
            if self.place_of_state(resume) is None and self.huggingface_repo_id is None:
                yield "--resume latest with --resume_from_huggingface needs --huggingface_repo_id."
        except UserError as error:
            yield str(error)

    def place_of_state(self, resume: str) -> HubPlace | None:
        """Return the place that `--resume` names, None for "latest". Raise `UserError` if it is none."""
        if resume == "latest":
            return None
        name, *details = resume.split(":")
        owner, _, rest = name.strip("/").partition("/")
        repository, _, path = rest.partition("/")
        kind = details[1] if len(details) > 1 else "model"
        is_place = len(details) <= 2 and path and kind in REPOSITORY_TYPES
        if not is_place or not _REPOSITORY.fullmatch(f"{owner}/{repository}"):
            raise UserError(
                f"--resume is '{resume}', which names no state on the hub.",
                "With --resume_from_huggingface it is owner/name/folder, owner/name/folder:revision or 'latest'.",
            )
        return HubPlace(f"{owner}/{repository}", path, details[0] if details else None, kind)

    def place_of(self, name: str = "") -> HubPlace:
        """Return where a file or folder is uploaded to."""
        assert self.huggingface_repo_id is not None
        folder = (self.huggingface_path_in_repo or "").strip("/")
        return HubPlace(self.huggingface_repo_id, "/".join(filter(None, (folder, name))), kind=self.kind)
