"""Block numbers of the U-Net's parameters."""

import json
from pathlib import Path

import pytest

from library.sdxl.unet_blocks import NUM_UNET_BLOCKS, unet_block_index

GOLDEN = Path(__file__).parents[1] / "golden" / "block_of_parameter.json"


def test_all_1680_parameters_have_the_block_of_the_reference():
    blocks = json.loads(GOLDEN.read_text(encoding="utf-8"))["blocks"]
    expected = {
        f"{module}.{parameter}": int(block)
        for block, modules_of in blocks.items()
        for parameters, modules in modules_of.items()
        for module in modules
        for parameter in parameters.split("+")
    }
    assert len(expected) == 1680
    assert {name: unet_block_index(name) for name in expected} == expected
    assert set(expected.values()) == set(range(NUM_UNET_BLOCKS))


def test_a_name_of_another_network_is_refused():
    with pytest.raises(ValueError, match="mid_block"):
        unet_block_index("mid_block.attentions.0.norm.weight")
