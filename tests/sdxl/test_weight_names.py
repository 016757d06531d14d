"""Names, shapes and forms of the tensors in an SDXL single file."""

import gzip
from pathlib import Path

import pytest
import torch

from library.sdxl.architecture import (
    SDXL_BASE,
    empty_text_encoder_g,
    empty_text_encoder_l,
    empty_unet,
    empty_vae,
)
from library.sdxl.weight_names import (
    LOGIT_SCALE,
    Form,
    StoredTensor,
    text_encoder_g_table,
    text_encoder_l_table,
    unet_name,
    unet_table,
    vae_name,
    vae_table,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "sdxl_single_file_keys.tsv.gz"


@pytest.fixture(scope="module")
def full_size():
    """(network, table) of the four networks of SDXL base, without weights."""
    networks = [
        (empty_unet(SDXL_BASE), unet_table),
        (empty_vae(SDXL_BASE), vae_table),
        (empty_text_encoder_l(SDXL_BASE), text_encoder_l_table),
        (empty_text_encoder_g(SDXL_BASE), text_encoder_g_table),
    ]
    return [(network, table_of(network)) for network, table_of in networks]


def recorded_shapes():
    lines = gzip.decompress(GOLDEN.read_bytes()).decode().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return {name: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for name, _, shape in rows}


def test_the_tables_give_exactly_the_names_and_shapes_of_the_file_that_stability_ai_published(full_size):
    made = {}
    for network, table in full_size:
        parameters = network.state_dict()
        for stored in table:
            assert stored.name not in made
            made[stored.name] = tuple(stored.from_parameters([parameters[name] for name in stored.parameters]).shape)

    recorded = recorded_shapes()
    assert len(recorded) == 2515
    expected = {name: shape for name, shape in recorded.items() if not name.endswith(".position_ids")}
    assert expected.pop(LOGIT_SCALE) == ()
    assert made == expected


def test_every_parameter_of_the_networks_is_stored_exactly_once(full_size):
    for network, table in full_size:
        stored = [name for entry in table for name in entry.parameters]
        assert sorted(stored) == sorted(network.state_dict())


@pytest.mark.parametrize(
    ("form", "shape", "num_parameters"),
    [
        (Form.SAME, (3, 5), 1),
        (Form.TRANSPOSED, (3, 5), 1),
        (Form.POINTWISE, (3, 5, 1, 1), 1),
        (Form.STACKED, (12, 5), 3),
    ],
)
def test_a_tensor_survives_the_way_to_the_network_and_back(form, shape, num_parameters):
    stored = StoredTensor("name", tuple("qkv"[:num_parameters]), form)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parameters = list(stored.to_parameters(tensor))
    assert len(parameters) == num_parameters
    assert torch.equal(stored.from_parameters(parameters), tensor)


def test_the_projection_of_the_pooled_vector_is_stored_transposed(full_size):
    _, table_g = full_size[3]
    forms = {stored.name.rpartition(".")[2]: stored.form for stored in table_g}
    assert forms["text_projection"] is Form.TRANSPOSED
    assert list(forms.values()).count(Form.TRANSPOSED) == 1


@pytest.mark.parametrize(
    ("parameter", "stored"),
    [
        ("time_embedding.linear_1.weight", "time_embed.0.weight"),
        ("down_blocks.0.downsamplers.0.conv.bias", "input_blocks.3.0.op.bias"),
        ("down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight",
         "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight"),
        ("mid_block.resnets.1.time_emb_proj.weight", "middle_block.2.emb_layers.1.weight"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.2.conv.weight"),
        ("up_blocks.2.resnets.2.conv_shortcut.weight", "output_blocks.8.0.skip_connection.weight"),
    ],
)  # fmt: skip
def test_u_net_parameters_have_the_names_of_the_file(parameter, stored):
    assert unet_name(parameter) == stored


@pytest.mark.parametrize(
    ("parameter", "stored"),
    [
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "encoder.down.1.block.0.nin_shortcut.weight"),
        ("decoder.up_blocks.0.resnets.2.norm1.weight", "decoder.up.3.block.2.norm1.weight"),
        ("decoder.mid_block.attentions.0.to_out.0.bias", "decoder.mid.attn_1.proj_out.bias"),
        ("quant_conv.weight", "quant_conv.weight"),
    ],
)
def test_vae_parameters_have_the_names_of_the_file_and_the_decoder_counts_from_the_picture(parameter, stored):
    assert vae_name(parameter) == stored
