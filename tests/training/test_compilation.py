"""Compiled blocks compute what they did, under the names that they had, and where they cannot they say so."""

import copy
import math

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from library.config.errors import UserError
from library.optim import kernels as compiled_kernels
from library.training import compilation
from library.training.compilation import compile_regions
from library.training.compile_options import CompileOptions

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
TRACED = CompileOptions(torch_compile=True, dynamo_backend="aot_eager")  # the whole way but the C++ compiler
CHANNELS = 16


class Blocks(nn.Module):
    """A residual block and two transformer blocks, as they lie in a U-Net."""

    def __init__(self):
        super().__init__()
        self.resnet = ResnetBlock2D(in_channels=CHANNELS, temb_channels=CHANNELS, groups=4)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(CHANNELS, 1, CHANNELS, cross_attention_dim=CHANNELS) for _ in range(2)
        )

    def forward(self, pixels):
        hidden = self.resnet(pixels, pixels.mean(dim=(2, 3)))
        hidden = hidden.flatten(2).transpose(1, 2).contiguous()
        text = torch.ones(1, 3, CHANNELS)
        for block in self.blocks:
            hidden = torch.utils.checkpoint.checkpoint(block, hidden, encoder_hidden_states=text, use_reentrant=False)
        return hidden


@pytest.fixture
def blocks():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Blocks()


def pixels_of(side, seed=1):
    return torch.randn(1, CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def gradient_of(network, pixels):
    network.zero_grad()
    loss = network(pixels).square().mean()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def test_loss_and_gradient_are_those_of_the_blocks_as_they_are_and_compiling_is_reported(blocks, monkeypatch, caplog):
    monkeypatch.setattr(compilation, "_NOTEWORTHY_SECONDS", 0.0)
    compiled = copy.deepcopy(blocks)
    compile_regions(compiled, TRACED, CPU)
    before = num_graphs()
    for side in (4, 6, 8):
        (loss, gradient), (expected_loss, expected) = (
            gradient_of(each, pixels_of(side)) for each in (compiled, blocks)
        )
        # float32 sums in another order: a few units of the seventh digit
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert all(torch.allclose(gradient[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)
    assert num_graphs() - before == 4  # for each kind the first size, then one for any size
    ours = [record.getMessage() for record in caplog.records if record.name == compilation.__name__]
    first, *timed = ours
    assert first == "torch.compile: the first step compiles kernels, which can take minutes"
    assert [line.partition(" s of ")[2] for line in timed] == ["compiling", "compiling for another size of image"]


def test_names_and_copies_of_the_network_are_as_before(blocks):
    names = list(blocks.state_dict())
    compile_regions(blocks, TRACED, CPU)
    assert list(blocks.state_dict()) == names
    other = copy.deepcopy(blocks)
    nn.init.zeros_(blocks.resnet.conv2.weight)
    with torch.no_grad():
        assert not torch.equal(other(pixels_of(4)), blocks(pixels_of(4)))


def test_nothing_is_compiled_without_gradients_or_without_the_flag(blocks):
    before = num_graphs()
    compile_regions(blocks, CompileOptions(), CPU)
    blocks(pixels_of(4))
    assert num_graphs() == before
    compile_regions(blocks, TRACED, CPU)
    compiled_to_try = num_graphs()
    with torch.no_grad():
        blocks(pixels_of(4))
    assert num_graphs() == compiled_to_try


def test_sizes_beyond_the_limit_run_uncompiled_and_that_is_reported_once_for_each_kind(blocks, monkeypatch, caplog):
    for room in (compilation, compiled_kernels):
        monkeypatch.setattr(room, "MAX_KERNELS", 1)
    expected, _ = gradient_of(blocks, pixels_of(6))
    with torch._dynamo.config.patch(recompile_limit=1):
        compile_regions(blocks, TRACED, CPU)
        losses = [gradient_of(blocks, pixels_of(side))[0] for side in (4, 6, 8)]
    assert losses[1] == expected
    about_limit = [line.partition(" has")[0] for line in caplog.messages if "which is the limit" in line]
    assert about_limit == ["torch.compile: ResnetBlock2D", "torch.compile: BasicTransformerBlock"]


def test_a_machine_without_a_compiler_is_told_what_to_install(blocks, no_compiler):
    with pytest.raises(UserError, match=r"(?s)--torch_compile does not work here.*g\+\+, MSVC"):
        compile_regions(blocks, CompileOptions(torch_compile=True), CPU)


def test_a_backend_without_compilation_is_refused():
    assert list(CompileOptions(dynamo_backend="eager").problems())
    assert not list(TRACED.problems())


@pytest.mark.slow
def test_a_compiled_run_learns_draws_and_saves_what_an_uncompiled_one_does(train, tmp_path):
    prompts = tmp_path / "prompt.txt"
    prompts.write_text("a cat --e photo --w 64 --h 64 --s 1 --d 1", encoding="utf-8")
    flags = (f"--sample_prompts={prompts}", "--sample_every_n_steps=3", "--gradient_checkpointing")
    torch._dynamo.reset()
    plain, compiled = train(*flags), train(*flags, "--torch_compile")
    # float32 sums in another order, and what three steps of training make of that
    assert compiled.logged("loss/current") == pytest.approx(plain.logged("loss/current"), rel=1e-4)
    assert compiled.weights().keys() == plain.weights().keys()
    assert all(math.isfinite(weight.sum()) for weight in compiled.weights().values())
    assert len(list(compiled.output.glob("sample/*.png"))) == len(list(plain.output.glob("sample/*.png"))) == 2
