"""Write docs/flags.md from the option classes of the scripts: `python docs/write_flags.py`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

# Run as a script, Python looks for modules beside this file only; the scripts lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sdxl_train
from docs.flags_page import ScriptFlags, render_flags_page
from finetune import (
    prepare_buckets_latents,
    sdxl_merge_captions_g_to_metadata,
    sdxl_merge_captions_l_to_metadata,
)
from library.config.atomic_files import write_text
from library.config.kohya_flags import PREPARE_REFUSED, PREPARE_REPLACED, TRAINER_REFUSED, TRAINER_REPLACED

FLAGS_PAGE = Path(__file__).with_name("flags.md")
# Each script with the spellings it replaces and the flags it refuses.
SCRIPTS: list[tuple[ModuleType, Mapping[str, str], Mapping[str, str]]] = [
    (sdxl_merge_captions_g_to_metadata, {}, {}),
    (sdxl_merge_captions_l_to_metadata, {}, {}),
    (prepare_buckets_latents, PREPARE_REPLACED, PREPARE_REFUSED),
    (sdxl_train, TRAINER_REPLACED, TRAINER_REFUSED),
]


def flags_page() -> str:
    """Return the text of docs/flags.md."""
    return render_flags_page(
        [
            ScriptFlags(
                name=f"{script.__name__.replace('.', '/')}.py",
                description=script.DESCRIPTION,
                option_classes=script.OPTION_CLASSES,
                replaced=replaced,
                refused=refused,
            )
            for script, replaced, refused in SCRIPTS
        ]
    )


def main() -> int:
    """Write the page and return 0."""
    write_text(FLAGS_PAGE, flags_page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
