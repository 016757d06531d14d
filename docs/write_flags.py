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
    clean_captions_and_tags,
    contact_sheet,
    make_captions,
    prepare_buckets_latents,
    reconstruct_ema,
    run_report,
    sdxl_merge_captions_g_to_metadata,
    sdxl_merge_captions_l_to_metadata,
    tag_images_by_wd14_tagger,
)
from library.config.atomic_files import write_text
from library.config.kohya_spellings import GENERATE_SPELLINGS, PREPARE_SPELLINGS, TRAINER_SPELLINGS
from library.config.spellings import Spellings
from studio import command as studio_command

FLAGS_PAGE = Path(__file__).with_name("flags.md")


def _flags_of(script: ModuleType, spellings: Spellings) -> ScriptFlags:
    """Return the command line of a script, with the spellings of other programs that it reads."""
    name = f"{script.__name__.replace('.', '/')}.py"
    return ScriptFlags(name, script.DESCRIPTION, script.OPTION_CLASSES, spellings)


SCRIPTS = [
    _flags_of(tag_images_by_wd14_tagger, tag_images_by_wd14_tagger.SPELLINGS),
    _flags_of(make_captions, make_captions.SPELLINGS),
    _flags_of(clean_captions_and_tags, Spellings()),
    ScriptFlags(
        "finetune/clean_captions_and_tags.py with --undo",
        clean_captions_and_tags.UNDO_DESCRIPTION,
        clean_captions_and_tags.UNDO_CLASSES,
        Spellings(),
    ),
    _flags_of(sdxl_merge_captions_g_to_metadata, Spellings()),
    _flags_of(sdxl_merge_captions_l_to_metadata, Spellings()),
    _flags_of(prepare_buckets_latents, PREPARE_SPELLINGS),
    ScriptFlags(
        "finetune/prepare_buckets_latents.py with --dataset_config",
        prepare_buckets_latents.DATA_SET_DESCRIPTION,
        prepare_buckets_latents.DATA_SET_CLASSES,
        PREPARE_SPELLINGS,
    ),
    _flags_of(sdxl_train, TRAINER_SPELLINGS),
    _flags_of(sdxl_gen_img, GENERATE_SPELLINGS),
    _flags_of(reconstruct_ema, Spellings()),
    _flags_of(contact_sheet, Spellings()),
    ScriptFlags("studio.py", studio_command.DESCRIPTION, studio_command.OPTION_CLASSES, Spellings()),
    _flags_of(run_report, Spellings()),
]


def flags_page() -> str:
    """Return the text of docs/flags.md."""
    return render_flags_page(SCRIPTS)


def main() -> int:
    """Write the page and return 0."""
    write_text(FLAGS_PAGE, flags_page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
