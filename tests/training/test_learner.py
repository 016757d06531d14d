"""What a run that has an optimizer of two points, schedule-free, trains, draws and saves."""

import torch

from library.sdxl.tensor_file import open_tensors

FLAGS = ("--optimizer_type=AdamWScheduleFree", "--learning_rate=1e-3", "--save_state_on_train_end")
NAME = "unet.conv_in.weight"
SAVED_NAME = "model.diffusion_model.input_blocks.0.0.weight"


def weights_to_go_on_with(run) -> torch.Tensor:
    [state] = run.output.glob("m-*state")
    with open_tensors(state / "weights.safetensors") as reader:
        return reader.get(NAME).clone()


def test_pictures_in_between_change_nothing(train, tmp_path):
    prompts = tmp_path / "prompt.txt"
    prompts.write_text("a dog --e photo --w 64 --h 64 --s 1 --d 3", encoding="utf-8")
    plain = train(*FLAGS)
    drawn = train(*FLAGS, f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    assert torch.equal(weights_to_go_on_with(plain), weights_to_go_on_with(drawn))
    weights, others = plain.weights(), drawn.weights()
    assert [name for name, tensor in weights.items() if not torch.equal(tensor, others[name])] == []


def test_the_saved_model_has_the_averaged_weights_and_the_state_those_to_go_on_with(train):
    run = train(*FLAGS, "--optimizer_args", "betas=0.9,0.99")
    [state] = run.output.glob("m-*state")
    trained_at = weights_to_go_on_with(run)
    averaged = run.weights()[SAVED_NAME].float()
    optimizer = torch.load(state / "optimizer.pt", weights_only=True)
    fastest = next(each["z"] for each in optimizer["state"] if each["z"].shape == trained_at.shape)
    # y = (1 - beta) z + beta x (Defazio et al. 2024, equation 2), so x is a step of 1 - 1 / beta from y to z.
    expected = torch.lerp(trained_at, fastest, 1 - 1 / 0.9)
    # The file holds float16 or float32 as the run does; here float32: one rounding of the interpolation.
    torch.testing.assert_close(averaged, expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(averaged, trained_at)
