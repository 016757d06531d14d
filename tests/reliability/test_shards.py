"""Weights that processes share train as whole ones do, and are saved and resumed as these."""

import signal
from pathlib import Path

import pytest

from library.config.errors import UserError
from library.optim.options import ADAFACTOR_RECIPE
from library.training.progress import newest_state, read_progress
from tests.outcome import differences
from tests.reliability import in_shares
from tests.reliability.conftest import LIMIT_OF_BFLOAT16, Runs

pytestmark = pytest.mark.trains

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ADAM = ("--optimizer_type=AdamW", "--learning_rate=1e-3", "--optimizer_args", "eps=1e-6")
"""A gradient of nothing but rounding errors does not move a weight as far as any other with this eps."""


def test_parts_move_as_the_whole_and_are_saved_and_resumed(together, tmp_path: Path):
    together(2, in_shares.share_as_whole, **FSDP)
    together(2, in_shares.save_and_resume, str(tmp_path), **FSDP)


@pytest.mark.slow
def test_two_copies_of_two_parts_move_as_the_whole_and_are_saved_and_resumed(together, tmp_path: Path):
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
    mesh = {**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", **sizes}
    together(4, in_shares.share_as_whole, **mesh)
    together(4, in_shares.save_and_resume, str(tmp_path), **mesh)


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_moves_no_part_in_any(together):
    together(2, in_shares.not_a_number_in_one, **FSDP)


@pytest.mark.slow
def test_parts_of_three_move_as_the_whole(together):
    together(3, in_shares.share_as_whole, **FSDP)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (2, 3), (3, 2), (3, 1)])
def test_what_some_processes_save_others_resume(before: int, after: int, together, tmp_path: Path):
    for number, function in ((before, in_shares.save), (after, in_shares.resume)):
        together(number, function, str(tmp_path), **(FSDP if number > 1 else {}))


FACTORED = ("--optimizer_type=Adafactor", "--optimizer_args", "eps=(1e-12,1e-3)")
"""The same: a gradient below 1e-6 does not move a weight as far as any other."""
RECIPE = ADAFACTOR_RECIPE.split()[1:]
WAYS = {
    "plain": (*ADAM, "--gradient_checkpointing"),
    "all": (*ADAM, "--max_grad_norm=0.05", "--lr_scheduler=cosine", "--train_text_encoder", "--ema"),
    "accumulated": (
        *(*ADAM, "--gradient_accumulation_steps=2", "--offload_optimizer", "--train_text_encoder"),
        "--stop_training_te1=1",
    ),
    "adafactor": (
        *(*FACTORED, *RECIPE, "weight_decay=0.01", "--learning_rate=1e-3", "--max_grad_norm=0.05"),
        *("--lr_scheduler=cosine", "--train_text_encoder", "--ema"),
    ),
    "adafactor, rate found, fused": (*FACTORED, "--lr_scheduler=adafactor", "--fused_backward_pass"),
    "bfloat16": (*ADAM, "--mixed_precision=bf16", "--full_bf16", "--max_grad_norm=0.05"),
    "clipped, fused": (*ADAM, "--fused_backward_pass", "--max_grad_norm=0.05", "--gradient_checkpointing"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "way"), [*((2, way) for way in WAYS), *((3, way) for way in WAYS if way != "plain")], ids=str
)
def test_a_model_in_parts_trains_as_the_whole(number: int, way: str, runs: Runs, tiny_sdxl: Path):
    num_accumulated = 2 if way == "accumulated" else 1
    alone = [flag for flag in WAYS[way] if flag != "--fused_backward_pass"]  # which cannot accumulate
    runs.run("one", 1, *alone, f"--gradient_accumulation_steps={number * num_accumulated}")
    runs.run("parts", number, *WAYS[way], **FSDP)
    assert runs.distance("one", "parts", tiny_sdxl) < (LIMIT_OF_BFLOAT16 if way == "bfloat16" else 2e-5)


@pytest.fixture
def watched(runs: Runs) -> tuple[str, ...]:
    """Flags of a run with everything that a run leaves behind."""
    prompts = runs.folder / "prompts.txt"
    prompts.write_text("a cat --e official portrait --w 64 --h 64 --s 2 --d 3", encoding="utf-8")
    return (
        *(*WAYS["all"], "--max_train_steps=2", "--save_state", "--save_every_n_steps=1", "--sample_ema"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=2"),
        *("--validation_split=0.34", "--validate_every_n_steps=2", "--validation_timesteps=500"),
        *("--ema_snapshot_every_n_steps=2", "--ema_sigma_rel=0.1", "--mixed_precision=bf16", "--full_bf16"),
    )


@pytest.mark.slow
def test_a_run_in_parts_resumes_bit_for_bit_and_leaves_what_any_run_does(runs: Runs, watched: tuple[str, ...]):
    runs.run("whole", 2, *watched, **FSDP)
    runs.run("parts", 2, *watched, "--max_train_steps=1", **FSDP)
    runs.run("parts", 2, *watched, "--resume=latest", **FSDP)
    runs.run("one", 1, *watched, "--gradient_accumulation_steps=2")
    whole, one = runs.outcome("whole"), runs.outcome("one")
    assert whole.keys() == one.keys()
    parts = runs.outcome("parts")
    of_one_step = {name for name in {*whole, *parts} if "step00000001" in name or "validation" in name}
    for name in of_one_step:  # the first run has validated and saved after its only step
        whole.pop(name, None)
        parts.pop(name, None)
    assert differences(whole, parts) == []
    for name in [name for name in whole if name.startswith("model")]:
        assert {key: weight.shape for key, weight in whole[name].items()} == {
            key: weight.shape for key, weight in one[name].items()
        }


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 2)), ((1, 3), (3, 1))], ids=str)
def test_a_run_in_parts_goes_on_in_another_number_of_processes(before, after, runs: Runs, tiny_sdxl: Path):
    """Processes and accumulated batches, which make steps of the same images."""

    def run(name: str, split: tuple[int, int], *flags: str) -> None:
        shared = FSDP if split[0] > 1 else {}
        runs.run(name, split[0], *WAYS["all"], f"--gradient_accumulation_steps={split[1]}", *flags, **shared)

    run("whole", before)
    run("parts", before, "--max_train_steps=1", "--save_state")
    run("parts", after, "--resume=latest")
    assert runs.distance("whole", "parts", tiny_sdxl) < 2e-5


@pytest.mark.slow
def test_a_stop_and_a_wish_for_a_save_reach_all_parts(runs: Runs):
    pair = runs.start("stopped", 2, *ADAM, "--max_train_steps=50", **FSDP)
    pair[0].wait_until_said("1/50", timeout=600)
    (runs.output("stopped") / "save").touch()
    pair[0].wait_until(lambda: list(runs.output("stopped").glob("m-step*-state")), "saved", timeout=600)
    pair[1].send(signal.SIGTERM)
    assert sorted(each.wait(timeout=600) for each in pair) == [0, 143], [each.said for each in pair]
    assert f'--resume "{newest_state(runs.output("stopped"), "m")}"' in pair[0].said


@pytest.mark.slow
def test_a_killed_part_ends_the_others_which_name_the_last_whole_state(runs: Runs):
    pair = runs.start("killed", 2, *ADAM, "--max_train_steps=50", "--save_state", "--save_every_n_steps=1", **FSDP)
    pair[0].wait_until_said("3/50", timeout=600)
    pair[1].send(signal.SIGKILL)
    assert pair[0].wait(timeout=120) == 1
    newest = newest_state(runs.output("killed"), "m")
    assert f'Continue from the newest state with --resume "{newest}"' in pair[0].said
    assert "Traceback" not in pair[0].said


@pytest.mark.slow
def test_a_part_of_a_state_that_is_missing_or_damaged_is_named(together, tmp_path: Path):
    together(2, in_shares.save, str(tmp_path), **FSDP)
    shard = tmp_path / "AdamW-state" / "shard-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    together(1, in_shares.resume_damaged, str(tmp_path))
    together(2, in_shares.resume_damaged, str(tmp_path), **FSDP)
    shard.unlink()
    with pytest.raises(UserError, match=r"is not a complete state of this program \(.*shard-00002.safetensors"):
        read_progress(shard.parent)


@pytest.mark.slow
def test_an_optimizer_that_needs_whole_weights_is_refused(runs: Runs):
    pair = runs.start("whole", 2, "--optimizer_type=prodigyopt.Prodigy", "--learning_rate=1", **FSDP)
    assert [each.wait(timeout=600) for each in pair] == [2, 2]
    expected = "--optimizer_type=prodigyopt.Prodigy cannot work with FSDP: it needs whole weights"
    assert [expected in each.said for each in pair] == [True, False]
