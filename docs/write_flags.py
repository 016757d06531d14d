"""Write docs/flags.md from the option classes of the scripts: `python docs/write_flags.py`."""

import sys
from pathlib import Path
from types import ModuleType

# Run as a script, Python looks for modules beside this file only; the scripts lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sdxl_gen_img
import sdxl_train
from docs.flags_page import ScriptFlags, render_flags_page
from finetune import (
    prepare_buckets_latents,
    sdxl_merge_captions_g_to_metadata,
    sdxl_merge_captions_l_to_metadata,
)
from library.config.atomic_files import write_text
from library.config.kohya_spellings import GENERATE_SPELLINGS, PREPARE_SPELLINGS, TRAINER_SPELLINGS
from library.config.spellings import Spellings

FLAGS_PAGE = Path(__file__).with_name("flags.md")
# Each script with the spellings of other programs that it reads.
SCRIPTS: list[tuple[ModuleType, Spellings]] = [
    (sdxl_merge_captions_g_to_metadata, Spellings()),
    (sdxl_merge_captions_l_to_metadata, Spellings()),
    (prepare_buckets_latents, PREPARE_SPELLINGS),
    (sdxl_train, TRAINER_SPELLINGS),
    (sdxl_gen_img, GENERATE_SPELLINGS),
]


def flags_page() -> str:
    """Return the text of docs/flags.md."""
    return render_flags_page(
        [
            ScriptFlags(
                name=f"{script.__name__.replace('.', '/')}.py",
                description=script.DESCRIPTION,
                option_classes=script.OPTION_CLASSES,
                spellings=spellings,
            )
            for script, spellings in SCRIPTS
        ]
    )


def main() -> int:
    """Write the page and return 0."""
    write_text(FLAGS_PAGE, flags_page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
