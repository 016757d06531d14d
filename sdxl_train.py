"""Fine-tune Stable Diffusion XL with separate captions for its two text encoders.

    accelerate launch sdxl_train.py --pretrained_model_name_or_path sd_xl_base_1.0.safetensors --in_json meta_lat.json
        --train_data_dir images --output_dir output ...

docs/flags.md explains every flag, docs/architecture.md where to find what.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial

from library.config.environment import torch_environment

os.environ.update(torch_environment())  # read by torch when it is imported

from library.config.errors import exits_on_user_error
from library.config.kohya_spellings import TRAINER_SPELLINGS
from library.config.options import parse_options
from library.training.run_lock import other_runs, run_lock
from library.training.run_options import OPTION_CLASSES, TrainingOptions
from library.training.stopping import StopRequest, listening_for_stop

DESCRIPTION = "Fine-tune Stable Diffusion XL with separate captions for its two text encoders."


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit status."""
    options = TrainingOptions(
        *parse_options(
            OPTION_CLASSES,
            argv,
            description=DESCRIPTION,
            spellings=TRAINER_SPELLINGS,
            conflicts=lambda *classes: TrainingOptions(*classes).conflicts(),
            heavy_conflicts=lambda *classes: TrainingOptions(*classes).heavy_conflicts(),
        )
    )
    options.console.start()
    if options.schedule.plot_schedule is not None:
        return plot_of(options)
    if options.run.dry_run is not None:
        return dry_run_of(options)
    run = options.output_dir, options.save.output_name
    with run_lock(*run), listening_for_stop(*run, has_company=partial(other_runs, *run)) as stop:
        return train(options, stop)


def dry_run_of(options: TrainingOptions) -> int:
    """Show what would be trained, and return the exit status."""
    from library.runs.dry_run import dry_run

    return dry_run(options)


def plot_of(options: TrainingOptions) -> int:
    """Draw the learning rates of the run, and return the exit status."""
    from library.runs.schedule_plot import plot_schedule

    return plot_schedule(options)


def train(options: TrainingOptions, stop: StopRequest) -> int:
    """Run the training loop and return the exit status.

    Shapes: B images, T text positions, h and w latent cells.
    """
    # Only now: a mistake on the command line is answered without the seconds that importing torch takes.
    from library.sdxl.architecture import LATENT_SCALE
    from library.sdxl.size_conditioning import size_conditioning
    from library.sdxl.text_encoding import encode_captions
    from library.training.setup import set_up

    run = set_up(options, stop)
    learner, objective = run.learner, run.objective
    with run.begun():
        for step in run.plan.steps(run.progress, until=run.stop):
            for batch in step.batches:
                with learner.accumulating(batch, step.number):
                    latents = run.latents_of(batch) * LATENT_SCALE  # [B, 4, h, w]
                    text = encode_captions(  # hidden [B, T, 2048], pooled [B, 1280]
                        learner.text_encoder_l, learner.text_encoder_g, batch.tokens, batch.encoded, batch.weights
                    )
                    sizes = size_conditioning(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)  # [B, 6]
                    noisy = objective.draw(latents, step.generators(batch), batch.places)  # noise, timesteps, sum
                    predicted = learner.predict(noisy, text, sizes)  # [B, 4, h, w]
                    losses = objective.losses(predicted, latents, noisy, batch.masks)  # [B]
                    learner.backward(losses, batch, step.number)
            report = learner.step(step.number)  # clip, update, advance the schedule; a bad step updates nothing
            run.progress.advance()
            for event in run.events:
                event.after_step(step.occasion, report)
        return run.end()


if __name__ == "__main__":
    sys.exit(main())
