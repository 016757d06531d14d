"""Write what a run did as one page to look at or to send.

python finetune/run_report.py "my set/output"
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, find library/

from library.config.atomic_files import write_text
from library.config.errors import UserError, exits_on_user_error
from library.config.options import option, parse_options, positional

log = logging.getLogger(__name__)

DESCRIPTION = "Write one page about a run: its options, curves, samples, what L and G are worth, and its files."
_NAME = "run_report"


@dataclass(frozen=True)
class ReportOptions:
    """The run, and the page to write."""

    _argument_group_name: ClassVar[str] = "Report"

    output_dir: Path = positional("Output folder of the run.")
    run: str | None = option(
        None,
        "Report the run whose record in the folder 'run' has this name, such as 20261128143000_model. Default: the "
        "newest.",
    )
    output: Path | None = option(None, f"File to write. Default: {_NAME}.html in the output folder.")
    logging_dir: Path | None = option(
        None, "Read the curves from below this folder. Default: where the run wrote them; set it if logs were moved."
    )
    num_columns: int = option(
        10, "Show the samples of at most this many steps, evenly chosen, the first and the last among them.", least=1
    )
    image_side: int = option(256, "Reduce samples to this many pixels.", least=16, most=4096)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with these values, one sentence each."""
        if not self.output_dir.is_dir():
            yield f"there is no folder '{self.output_dir}'. Pass the --output_dir of a run."
        if self.logging_dir is not None and not self.logging_dir.is_dir():
            yield f"--logging_dir: there is no folder '{self.logging_dir}'."
        if self.page.suffix.lower() not in (".html", ".htm"):
            yield f"--output is '{self.output}'; the name of a page must end in .html."

    @property
    def page(self) -> Path:
        """The file to write."""
        return self.output_dir / f"{_NAME}.html" if self.output is None else self.output


OPTION_CLASSES: list[type] = [ReportOptions]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and return the exit status."""
    (options,) = parse_options(OPTION_CLASSES, argv, description=DESCRIPTION)
    from library.runs.files import find_run
    from library.runs.report import report
    from library.training.run_record import find_records

    records = find_records(options.output_dir)
    if not records:
        raise UserError(
            f"'{options.output_dir}' holds no record of a run.",
            "Pass the --output_dir of sdxl_train.py; runs before this version left no record, and "
            "finetune/contact_sheet.py shows their samples.",
        )
    names = [record.name for record in records]
    if options.run is not None and options.run not in names:
        raise UserError(f"--run: there is no record '{options.run}'.", f"There are {', '.join(names[-10:])}.")
    chosen = records[-1] if options.run is None else records[names.index(options.run)]
    run = find_run(options.output_dir, chosen, records, options.logging_dir, num_columns=options.num_columns)
    write_text(options.page, report(run, options.image_side))
    if options.run is None and len(records) > 1:
        log.info("the newest of %d runs; --run chooses another", len(records))
    log.info("report: '%s'", options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
