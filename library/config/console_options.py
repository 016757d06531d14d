"""The flags of messages: which are shown, and where."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.config.errors import UserError
from library.config.messages import start_logging
from library.config.options import option


@dataclass(frozen=True)
class ConsoleOptions:
    """Messages."""

    _argument_group_name: ClassVar[str] = "Messages"

    console_log_level: str | None = option(
        None,
        "Show messages of this level and above. Default: INFO.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: Path | None = option(None, "Append messages to this file; the console then shows errors only.")
    console_log_simple: bool = option(
        True, "Print messages alone. --console_log_simple=false adds time and level to each line."
    )

    def start(self) -> None:
        """Send messages where the options say. Raise `UserError` if the file cannot be written."""
        try:
            start_logging(self.console_log_level or "INFO", self.console_log_file, simple=self.console_log_simple)
        except OSError as error:
            raise UserError(
                f"--console_log_file: cannot write '{self.console_log_file}': {error.strerror or error}.",
                "Name a file in a folder that exists.",
            ) from error
