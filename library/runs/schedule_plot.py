"""The learning rates of a run as an image, without training."""

import logging

from library.config.atomic_files import replacing
from library.config.processes import share_of_process
from library.data.training_set import find_training_images
from library.optim.curve_image import draw_curves
from library.optim.lr_curves import rates_over_run
from library.optim.optimizers import rates_of_parts
from library.sdxl.latents import vae_digest
from library.sdxl.model_source import load_vae
from library.training.preparation import make_order, num_steps_of, read_images
from library.training.run_options import TrainingOptions

log = logging.getLogger(__name__)

_MOST_POINTS = 2000  # of a curve: more than the image has columns
_NO_SEED = 0  # the number of steps does not depend on it


def plot_schedule(options: TrainingOptions) -> int:
    """Draw the rate of each part of the model into the file of `--plot_schedule`, and return 0.

    The model is not loaded. Where epochs decide how long the run is, the images are read. Raise as training would.
    """
    path = options.schedule.plot_schedule
    assert path is not None
    num_steps = _num_steps(options)
    is_trained = {"text_encoder_l": options.trains_l, "text_encoder_g": options.trains_g}
    rates = rates_of_parts(options.optimizer)
    trained = {name: rate for name, rate in rates.items() if rate != 0 and is_trained.get(name, options.trains_unet)}
    at = range(0, num_steps, max(1, num_steps // _MOST_POINTS))
    curves = rates_over_run(options.optimizer, options.schedule, trained, num_steps=num_steps, at=at)
    for name, last in options.freeze_after(num_steps).items():
        curves[name] = [rate if step < last else 0.0 for step, rate in zip(at, curves[name], strict=True)]
    schedule = options.schedule.lr_scheduler_type or options.schedule.lr_scheduler
    what = "step relative to the size of the weights" if options.optimizer.finds_its_rate else "learning rate"
    image = draw_curves(f"{what}: {schedule}, {num_steps} steps", at, curves)
    with replacing(path) as file:
        image.save(file, "PNG")
    log.info("wrote '%s'", path)
    return 0


def _num_steps(options: TrainingOptions) -> int:
    if options.run.max_train_epochs is None:
        return options.run.max_train_steps
    source = options.model.vae or options.model.pretrained_model_name_or_path
    assert source is not None  # checked by problems()
    images = read_images(
        options.training_set, find_training_images(options.subsets()), vae_digest(load_vae(source, None))
    )
    order = make_order(images, options.run, _NO_SEED, num_processes=share_of_process().count, process_index=0)
    return num_steps_of(options.run, order)
