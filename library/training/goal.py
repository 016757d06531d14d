"""What a run learns: the prediction type of its model, its objective, and the weights of the loss where these learn."""

from functools import partial

from accelerate import Accelerator

from library.config.errors import error_of_problems
from library.diffusion.learnt_weights import LearntWeights
from library.diffusion.loss_options import EDM2
from library.diffusion.objective import Objective
from library.sdxl.model_source import read_prediction
from library.sdxl.prediction import Prediction
from library.training.learner import StepReport
from library.training.plan import Occasion
from library.training.resumable import Kept
from library.training.run_options import TrainingOptions

LOSS_WEIGHTS = "loss_weights"
"""The name of learnt weights in a state."""


def check_prediction(options: TrainingOptions) -> None:
    """Log what the model predicts. Raise `UserError` if the options do not fit it; no weights are read."""
    prediction = read_prediction(options.model, options.prediction)
    problems = list(options.misfits(prediction.kind))
    if problems:
        raise error_of_problems(problems)


class LossWeights:
    """The event that lets the weights of the loss learn after each step, if they are `learnt`."""

    def __init__(self, learnt: LearntWeights | None, accelerator: Accelerator):
        self.learnt = learnt
        self._sum_over_processes = partial(accelerator.reduce, reduction="sum")

    def after_step(self, occasion: Occasion, report: StepReport | None) -> None:
        """Learn from the losses of the step; those of a skipped step are forgotten."""
        if self.learnt is None or report is None:
            return
        if report.is_skipped:
            self.learnt.forget()
        else:
            self.learnt.learn(self._sum_over_processes)

    def kept(self) -> dict[str, Kept]:
        """Return what a state holds of them."""
        return {} if self.learnt is None else {LOSS_WEIGHTS: self.learnt}


def make_loss_weights(options: TrainingOptions, accelerator: Accelerator) -> LossWeights:
    """Return the weights of the loss as the options ask for them."""
    if options.loss.loss_weighting != EDM2:
        return LossWeights(None, accelerator)
    learnt = LearntWeights(options.loss.edm2_channels, options.loss.edm2_learning_rate, accelerator.device)
    return LossWeights(learnt, accelerator)


def make_objective(options: TrainingOptions, prediction: Prediction, weights: LossWeights) -> Objective:
    """Return the objective of a model that predicts this."""
    return Objective(options.noise, prediction, timesteps=options.timesteps, loss=options.loss, learnt=weights.learnt)
