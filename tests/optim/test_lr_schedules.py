"""Learning rates over a run, as the reference trainer set them."""

import json
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from diffusers.optimization import get_piecewise_constant_schedule

from library.config.config_file import write_config_file
from library.config.errors import UserError
from library.config.options import ConfigFileOptions, parse_options, problems_of
from library.config.options import options_of as declared
from library.optim.adafactor import Adafactor
from library.optim.lr_curves import rates_over_run
from library.optim.lr_schedules import make_lr_schedule
from library.optim.option_conflicts import optimizer_conflicts, schedule_refusals
from library.optim.options import OptimizerOptions
from library.optim.schedule_options import SCHEDULES, ScheduleOptions

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "lr_schedules.json").read_text(encoding="utf-8"))
MORE = json.loads((FOLDER / "lr_schedules_more.json").read_text(encoding="utf-8"))["cases"]
OF_ADAFACTOR = [case for case in MORE if "optimizer" in case]
PLAIN = [case for case in MORE if "optimizer" not in case]
NUM_STEPS = 100
WITHOUT_GOLDEN = {"piecewise_constant", "rex"}  # the reference has the first, of diffusers, but no row of it

# What the reference does by mistake and this trainer refuses: a warm-up that never ends, a rate that jumps down where
# warm-up and decay overlap.
REFUSED_HERE = (
    ["--lr_scheduler=linear", "--lr_warmup_steps=30"],
    ["--lr_scheduler=linear", "--lr_warmup_steps=150%"],
    ["--lr_scheduler=warmup_stable_decay", "--lr_warmup_steps=30", "--lr_decay_steps=30"],
)
# What it refuses by mistake: whole numbers written with a point.
ALLOWED_HERE = (["--lr_scheduler=linear", "--lr_warmup_steps=10.0"], ["--lr_scheduler=linear", "--lr_warmup_steps=1.0"])


def options_of(name: str) -> ScheduleOptions:
    flags = dict(flag.removeprefix("--").split("=") for flag in GOLDEN[name]["flags"])
    return ScheduleOptions(
        lr_scheduler=name,
        lr_warmup_steps=float(flags.get("lr_warmup_steps", 0)),
        lr_scheduler_num_cycles=int(flags.get("lr_scheduler_num_cycles", 1)),
        lr_scheduler_power=float(flags.get("lr_scheduler_power", 1)),
    )


def parsed(flags: list[str]) -> ScheduleOptions:
    """The options of a command line. Raises `UserError` for what is refused."""
    [options] = parse_options([ScheduleOptions], flags, description="")
    return options


def rates_over_a_run(options: ScheduleOptions, learning_rate: float = 1e-5, num_steps: int = NUM_STEPS) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedule = make_lr_schedule(optimizer, options, num_steps)
    rates = []
    for _ in range(num_steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", GOLDEN)
def test_the_rate_of_every_step_equals_the_reference(name: str):
    # 1e-12: the same formula in double precision, whose order of operations may differ between versions.
    assert rates_over_a_run(options_of(name)) == pytest.approx(GOLDEN[name]["lr_used_at_step_0_to_100"], rel=1e-12)


def test_every_schedule_on_offer_is_checked_against_the_reference():
    recorded = {flag.partition("=")[2].partition(":")[0] for case in MORE for flag in case["flags"][:1]}
    assert {kind.name for kind in SCHEDULES} - WITHOUT_GOLDEN == (set(GOLDEN) | recorded) - {"reduce_lr_on_plateau"}


@pytest.mark.parametrize(
    "case", [case for case in MORE if "optimizer" not in case], ids=lambda case: str(case["flags"])
)
def test_further_schedules_equal_the_reference_except_for_its_named_faults(case: dict):
    def rates() -> list[float]:
        options, num_steps = parsed(case["flags"]), case["max_train_steps"]
        assert options.warmup(num_steps * case.get("processes", 1)) == case.get("warmup_steps", options.lr_warmup_steps)
        return rates_over_a_run(options, case["base_lr"], num_steps)

    if case["flags"] in ALLOWED_HERE:
        whole = [flag.replace(".0", "") for flag in case["flags"]]
        assert rates() == rates_over_a_run(parsed(whole), num_steps=case["max_train_steps"])
    elif "error" in case or case["flags"] in REFUSED_HERE:
        with pytest.raises(UserError):
            rates()
    else:
        # With two GPUs the reference counts every step twice, of twice as many: the same fractions of the run.
        assert rates() == pytest.approx(case["lr_used"], rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("case", OF_ADAFACTOR, ids=lambda case: str(case["flags"]))
def test_adafactor_reports_the_rates_that_it_finds(case: dict):
    made = case["optimizer"]
    value = torch.full((4,), made["parameter_value"])
    optimizer = Adafactor(
        [{"params": [torch.nn.Parameter(value)], "lr": 0.5}],
        scale_parameter=made["scale_parameter"],
        warmup_init=made["warmup_init"],
    )
    if "error" in case:
        with pytest.raises(UserError, match="--lr_warmup_steps has no effect on adafactor"):
            parsed(case["flags"])
        return
    schedule = make_lr_schedule(optimizer, parsed(case["flags"]), case["max_train_steps"])
    [group] = optimizer.param_groups
    reported, used = [], []
    for _ in case["lr_used"]:
        reported.append(group["lr"])
        group["params"][0].grad = torch.zeros(4)
        optimizer.step()
        used.append(optimizer.rate_of_last_step(group))
        schedule.step()
    assert reported == case["lr_reported"]
    assert used == case["lr_used"]


def test_the_rate_that_adafactor_finds_moves_the_weights_as_in_transformers():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 24).view(6, 4)) for _ in range(2))
    optimizers = (Adafactor([ours], warmup_init=True), transformers.Adafactor([theirs], warmup_init=True))
    for step in range(1, 5):
        for parameter in (ours, theirs):
            parameter.grad = torch.linspace(-step, 1, 24).view(6, 4)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_pieces_end_at_steps_counted_from_the_beginning_as_in_diffusers():
    rules = "1:10,0.1:20,0.01:30,0.005"
    rates = rates_over_a_run(
        parsed(["--lr_scheduler=piecewise_constant", f"--lr_scheduler_args=step_rules={rules}"]), 1
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    [factor] = get_piecewise_constant_schedule(optimizer, rules).lr_lambdas
    assert rates == [factor(step) for step in range(NUM_STEPS + 1)]


def test_rex_stays_above_a_line_and_ends_at_its_lowest_rate():
    flags = ["--lr_scheduler=rex", "--lr_warmup_steps=10", "--lr_scheduler_min_lr_ratio=0.1"]
    rates = rates_over_a_run(parsed(flags), 1.0)
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert rates[-1] == pytest.approx(0.1)
    # Equation 5 of the paper in the middle of the run: (1 - z) / (1/2 + (1 - z) / 2) for z = 1/2.
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 / 0.75)
    falling = rates[10:]
    assert all(one > other for one, other in pairwise(falling))
    assert all(rate >= 1 - 0.9 * step / 90 - 1e-12 for step, rate in enumerate(falling))


def test_a_percentage_is_a_fraction_of_the_steps_in_a_file_too(tmp_path: Path):
    file = tmp_path / "options.toml"
    for text, expected in (("'100%'", 50), ("1.0", 1), ("0.1", 5), ("'12.5%'", 6), ("20", 20)):
        file.write_text(f"lr_scheduler = 'linear'\nlr_warmup_steps = {text}", encoding="utf-8")
        options, _ = parse_options([ScheduleOptions, ConfigFileOptions], [f"--config_file={file}"], description="")
        assert options.warmup(50) == expected
        file.unlink()
        write_config_file(file, [options], declared(ScheduleOptions))
        again, _ = parse_options([ScheduleOptions, ConfigFileOptions], [f"--config_file={file}"], description="")
        assert (again, str(again.lr_warmup_steps)) == (options, str(options.lr_warmup_steps))


def test_a_warmup_below_one_is_a_share_of_the_steps():
    share = ScheduleOptions("constant_with_warmup", lr_warmup_steps=0.1)
    assert rates_over_a_run(share) == rates_over_a_run(options_of("constant_with_warmup"))


def test_every_parameter_group_keeps_its_share_of_the_rate():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-5, 1e-6)]
    optimizer = torch.optim.SGD(groups, lr=1e-5)
    schedule = make_lr_schedule(optimizer, ScheduleOptions("linear", lr_warmup_steps=10), NUM_STEPS)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-6, 5e-7])


@pytest.mark.parametrize(
    ("options", "learning_rate", "expected"),
    [
        (ScheduleOptions("linear", lr_warmup_steps=101), 1e-5, "--lr_warmup_steps is 101, but the run has 100 steps"),
        (ScheduleOptions("polynomial"), 1e-7, "--learning_rate is 1e-07"),
        (ScheduleOptions("cosine_with_min_lr", lr_scheduler_args=["min_lr=1e-5"]), 1e-5, "falls to 1e-05, but"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(options: ScheduleOptions, learning_rate: float, expected: str):
    with pytest.raises(UserError, match=expected):
        rates_over_a_run(options, learning_rate)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (ScheduleOptions("sine"), "must be one of constant, constant_with_warmup, linear"),
        (ScheduleOptions("linear", lr_warmup_steps=1.5), "--lr_warmup_steps is 1.5"),
        (ScheduleOptions("linear", lr_warmup_steps=-1), "--lr_warmup_steps is -1"),
        (ScheduleOptions("linear", lr_warmup_steps=float("nan")), "--lr_warmup_steps is nan"),
        (ScheduleOptions("constant", lr_warmup_steps=10), "use --lr_scheduler=constant_with_warmup"),
        (ScheduleOptions("linear", lr_scheduler_num_cycles=3), "only on cosine_with_restarts"),
        (ScheduleOptions("cosine_with_restarts", lr_scheduler_num_cycles=0), "must be 1 or more"),
        (ScheduleOptions("linear", lr_scheduler_power=2), "only on polynomial"),
        (ScheduleOptions("polynomial", lr_scheduler_power=0), "must be 0.01 or more"),
        (ScheduleOptions("cosin"), "Did you mean cosine?"),
        (
            ScheduleOptions("cosine", lr_decay_steps=3),
            "no effect on cosine; only on warmup_stable_decay",
        ),
        (ScheduleOptions("warmup_stable_decay"), "needs --lr_decay_steps"),
        (ScheduleOptions("piecewise_constant"), "needs --lr_scheduler_args step_rules=1:1000,0.1:2000,0.01"),
        (ScheduleOptions("piecewise_constant", lr_scheduler_args=["step_rules=1:20,0.1:10,0"]), "with rising steps"),
        (ScheduleOptions("piecewise_constant", lr_scheduler_args=["step_rules=high:20,0"]), "with rising steps"),
        (ScheduleOptions("linear", lr_scheduler_args=["lr_end=0"]), "linear does not take lr_end; it takes none"),
        (ScheduleOptions("polynomial", lr_scheduler_args=["lr_end='low'"]), "lr_end is 'low'; it must be a number"),
        (ScheduleOptions("polynomial", lr_scheduler_args=["lr_end"]), "'lr_end' is not understood"),
        (
            ScheduleOptions("warmup_stable_decay", lr_decay_steps=9, lr_scheduler_args=["decay_type=steep"]),
            "decay_type is 'steep'; it must be one of 'linear', 'cosine', '1-sqrt'",
        ),
        (ScheduleOptions("cosine_with_min_lr"), "needs its lowest rate"),
        (
            ScheduleOptions("cosine_with_min_lr", lr_scheduler_min_lr_ratio=0, lr_scheduler_args=["min_lr=0"]),
            "needs its lowest rate",
        ),
        (ScheduleOptions("adafactor:fast"), "behind the colon it must be a learning rate"),
        (ScheduleOptions("linear", lr_scheduler_type="OneCycleLR"), "--lr_scheduler=linear has no effect beside"),
        (ScheduleOptions(lr_scheduler_type="OneCycleLR", lr_warmup_steps=3), "use --lr_scheduler_args"),
        (ScheduleOptions(plot_schedule=Path("rates.jpg")), "its name must end in .png"),
    ],
)
def test_values_that_cannot_work_are_named(options: ScheduleOptions, expected: str):
    [problem] = problems_of(options)
    assert expected in problem


@pytest.mark.parametrize("name", GOLDEN)
def test_sound_values_have_no_problems(name: str):
    assert list(options_of(name).problems()) == []


# -- classes by their path --------------------------------------------------------------------------------------------

CLASSES = {
    "CosineAnnealingLR": ["T_max=6", "eta_min=1e-4"],
    "torch.optim.lr_scheduler.OneCycleLR": ["max_lr=0.1", "total_steps=8"],
    "CosineAnnealingWarmRestarts": ["T_0=3"],
    "MultiStepLR": ["milestones=2,4"],
    "CyclicLR": ["base_lr=0.01", "max_lr=0.1", "step_size_up=2"],
}


def of_class(name: str, args: list[str]) -> ScheduleOptions:
    return parsed([f"--lr_scheduler_type={name}", "--lr_scheduler_args", *args])


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_by_its_path_is_the_schedule(name: str):
    options, momentum = of_class(name, CLASSES[name]), {"lr": 0.1, "momentum": 0.9}
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], **momentum) for _ in range(2)]
    ours = make_lr_schedule(optimizers[0], options, 8)
    theirs = getattr(torch.optim.lr_scheduler, name.rpartition(".")[2])(optimizers[1], **options.arguments)
    assert type(ours) is type(theirs)
    chosen = OptimizerOptions("torch.optim.SGD", ["momentum=0.9"], learning_rate=0.1)
    before = rates_over_run(chosen, options, {"unet": 0.1}, num_steps=8, at=range(9))["unet"]
    for rate in before[:-1]:
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"] == rate
        for optimizer, schedule in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (of_class("CosineAnealingLR", []), "has no attribute 'CosineAnealingLR'"),
        (of_class("torch.optim.SGD", []), "is not a learning-rate schedule"),
        (of_class("json.JSONDecoder", []), "which is no installed package"),
        (of_class("no_such.Schedule", []), "'no_such' is not installed"),
        (of_class("ReduceLROnPlateau", []), "needs metrics in every step"),
        (of_class("CosineAnnealingLR", []), "refuses its arguments"),
        (of_class("CosineAnnealingLR", ["T_max='long'"]), "ends after step 1 of 8"),
        (of_class("OneCycleLR", ["max_lr=0.1", "total_steps=4"]), "ends after step 5 of 8: Tried to step 5 times"),
        (of_class("LinearLR", ["start_factor=0.5", "end_factor=1.0", "total_iters=4"]), ""),
        (of_class("CosineAnnealingLR", ["T_max=4", "eta_min=-1.0"]), "leads to the learning rate -"),
    ],
    ids=lambda value: str(getattr(value, "lr_scheduler_type", value))[:40],
)
def test_a_class_that_cannot_last_for_the_run_is_named_before_it(options: ScheduleOptions, reason: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = list(schedule_refusals(OptimizerOptions(learning_rate=0.1), options, 8))
    if not reason:
        assert said == []
        return
    [sentence] = said
    assert sentence.startswith("--lr_scheduler_type ")
    assert reason in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("optimizer", "schedule", "problem"),
    [
        (OptimizerOptions("Adafactor"), ScheduleOptions(), "let it, with --lr_scheduler=adafactor"),
        (OptimizerOptions("AdamW"), ScheduleOptions("adafactor"), "--optimizer_type=Adafactor finds"),
        (OptimizerOptions("Adafactor", ["relative_step=False"]), ScheduleOptions("adafactor"), "--optimizer_type=Ada"),
        (
            OptimizerOptions("Adafactor", learning_rate_te1=1e-7),
            ScheduleOptions("adafactor"),
            "--learning_rate_te1 would",
        ),
        (OptimizerOptions("AdamWScheduleFree"), ScheduleOptions("cosine"), "set --lr_scheduler=constant"),
        (OptimizerOptions("AdamWScheduleFree"), ScheduleOptions(lr_scheduler_type="X"), "set --lr_scheduler=constant"),
        (OptimizerOptions(), ScheduleOptions("linear", lr_warmup_steps=9), "--lr_warmup_steps is 9, but the run has 8"),
        (OptimizerOptions("Adafactor"), ScheduleOptions("adafactor:1e-5"), ""),
    ],
)
def test_conflicts_of_optimizer_and_schedule(optimizer: OptimizerOptions, schedule: ScheduleOptions, problem: str):
    said = list(optimizer_conflicts(optimizer, schedule, 8))
    assert len(said) == bool(problem)
    assert problem in "".join(said)
