"""Draw images of an SDXL model with a prompt for each text encoder.

    python sdxl_gen_img.py --ckpt finetuned_model.safetensors --prompt_file prompt.txt --outdir images

Without a prompt it asks for them: the prompt for G, then the one for L.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from library.config.environment import torch_environment

os.environ.update(torch_environment())  # read by torch when it is imported

from library.config.errors import UserError, exits_on_user_error
from library.config.kohya_spellings import GENERATE_SPELLINGS
from library.config.options import parse_options
from library.samples.generation_options import DrawnModelOptions, ImageOptions
from library.samples.prompts import SamplePrompt, parse_prompt_line

DESCRIPTION = "Draw images of an SDXL model with a prompt for each text encoder."
EXIT_SOME_FAILED = 1
OPTION_CLASSES = [DrawnModelOptions, ImageOptions]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for; return 1 if some image could not be drawn."""
    model, images = parse_options(OPTION_CLASSES, argv, description=DESCRIPTION, spellings=GENERATE_SPELLINGS)
    # Only now: a mistake on the command line is answered without the seconds that importing torch takes.
    from library.samples.generation import Folder, draw_grid, draw_records, fresh_seeds, records_of
    from library.samples.sample_grid import make_sample_grid
    from library.sdxl.model_source import read_prediction
    from library.training.drawing_networks import load_networks

    folder = Folder(images.outdir)
    prediction = read_prediction(model.source, model.prediction)
    images.require_samplers(images.prompts(), prediction.kind)
    networks = load_networks(
        model.source,
        model.precision,
        holds_all_in_it=model.bf16 or model.fp16,
        zeros_l=images.zeros_l,
        zeros_g=images.zeros_g,
        prediction=model.prediction,
    )
    defaults = images.defaults(Path(model.ckpt).stem, prediction)
    seeds = fresh_seeds()
    if images.sample_grid:
        num_failed = draw_grid(networks, make_sample_grid(images.prompts()), defaults, seeds, folder)
        return EXIT_SOME_FAILED if num_failed else 0
    num_failed = 0
    for prompts in [images.prompts()] if images.names_prompts else _asked_for(images, prediction.kind):
        records = records_of(prompts, defaults, images.images_per_prompt, seeds)
        num_failed += draw_records(networks, records, images.batch_size, folder)
    return EXIT_SOME_FAILED if num_failed else 0


def _asked_for(images: ImageOptions, kind: str) -> Iterator[list[SamplePrompt]]:
    """Ask for prompts until the one for G is empty; a mistake is named and asked for again."""
    print("A prompt for G, which may end in options such as --n blurry --s 28; an empty one ends.")
    while prompt_g := _answer("G: "):
        prompt_l = _answer("L (empty: the same): ")
        try:
            prompt = parse_prompt_line(prompt_g, "G", images.settings)
            if prompt_l:
                prompt = parse_prompt_line(f"{prompt_g} --e {prompt_l}", "G and L", images.settings)
            images.require_samplers([prompt], kind)
        except UserError as error:
            print(error)
        else:
            yield [prompt]


def _answer(question: str) -> str:
    try:
        return input(question).strip()
    except EOFError:  # the end of a pipe, or Ctrl-D
        return ""
    except UnicodeDecodeError as error:
        raise UserError(f"what was entered is not UTF-8 ({error.reason}).", "Send the prompts as UTF-8.") from error


if __name__ == "__main__":
    sys.exit(main())
