"""What is asked of the Hugging Face Hub, and what its answers mean to the user of a run."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.config.errors import UserError
from library.training.hub_options import HubOptions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

ANSWER_SECONDS = 300.0
"""How long a connection may be silent. A dead one would never end otherwise."""
_PASSING_STATUS = frozenset({408, 409, 412, 425, 429})
"""Refusals that may be over at the next attempt: too slow, too many requests, another commit at the same time."""
_QUERY = re.compile(r"\?[^\s'\")]*")
_NO_TOKEN = "Pass --huggingface_token, set HF_TOKEN, or run 'hf auth login' once."


class Hub:
    """The hub as a run uses it. Importing its client takes a second, so that only a run with an upload does."""

    def __init__(self, options: HubOptions):
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars, get_session, get_token

        disable_progress_bars()  # the run has one
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self._options = options
        self._session: Callable[[], Any] = get_session
        self._token = options.huggingface_token or get_token()
        endpoint = os.environ.get("HF_ENDPOINT") or None  # at the time of the run, not when the client was imported
        self._api: HfApi = huggingface_hub.HfApi(endpoint=endpoint, token=self._token)

    @property
    def api(self) -> "HfApi":
        """The client, whose connections do not wait without end."""
        self._session().timeout = ANSWER_SECONDS  # the session may be another one after an error
        return self._api

    def require_repository(self) -> None:
        """Make the repository if it does not exist. Raise `UserError` if it cannot be written to.

        Without a network it is reported, and tried again with the first upload.
        """
        place = self._options.place_of()
        if self._token is None:
            raise UserError(f"there is no token to upload to '{place.repository}' with.", _NO_TOKEN)
        try:
            self.make_repository()
            self.api.auth_check(place.repository, repo_type=place.kind, write=True)
        except Exception as error:
            if not self.is_final(error):
                log.warning(
                    "the hub cannot be reached now (%s). Training continues; models are kept here, and uploading is "
                    "tried with each save and at the end.",
                    self.reason(error),
                )
                return
            raise UserError(
                f"the hub refuses uploads to the {place.kind} '{place.repository}': {self.reason(error)}.",
                "Check --huggingface_repo_id and --huggingface_repo_type, and that the token is of an account that may "
                "write there.",
            ) from error

    def make_repository(self) -> None:
        """Make the repository unless it exists. Raise what the client raises."""
        place = self._options.place_of()
        self.api.create_repo(
            place.repository,
            repo_type=place.kind,
            private=self._options.huggingface_repo_visibility != "public",
            exist_ok=True,
            space_sdk="static" if place.kind == "space" else None,
        )

    def upload(self, path: Path) -> None:
        """Upload a file or a folder. Raise what the client raises, `OSError` for a file that is gone."""
        place = self._options.place_of(path.name)
        message = f"Upload {path.name}"
        if path.is_dir():
            self.api.upload_folder(
                repo_id=place.repository,
                folder_path=path,
                path_in_repo=place.path,
                repo_type=place.kind,
                commit_message=message,
            )
        else:
            self.api.upload_file(
                repo_id=place.repository,
                path_or_fileobj=str(path),
                path_in_repo=place.path,
                repo_type=place.kind,
                commit_message=message,
            )

    def is_final(self, error: Exception) -> bool:
        """Return whether another attempt would end the same way."""
        status = status_of(error)
        if status is not None:
            return 400 <= status < 500 and status not in _PASSING_STATUS
        return _is_of_client(error, "HFValidationError", "OfflineModeIsEnabled")

    def reason(self, error: Exception) -> str:
        """Return the first line of an error, without the token and without the signatures in addresses."""
        status = status_of(error)
        if status == 401:
            return "the token is not accepted (401)"
        if status == 403:
            return "the token may not write there (403)"
        line = _QUERY.sub("", str(error).partition("\n")[0].strip().rstrip(".")) or type(error).__name__
        return line.replace(self._token, "(token)") if self._token else line


def status_of(error: BaseException | None) -> int | None:
    """Return the status that a server answered with, in the error or in those that caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _is_of_client(error: Exception, *names: str) -> bool:
    return any(each.__name__ in names for each in type(error).__mro__)
