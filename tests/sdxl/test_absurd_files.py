"""Model files and folders as nobody should write them: a clear refusal, and no other error, memory or time."""

import io
import json
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.config.errors import UserError
from library.sdxl.architecture import ARCHITECTURE_KEY
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file, read_vae
from library.sdxl.diffusers_folder import read_diffusers_folder

HALF = ModelDtypes(torch.float16, torch.float16, torch.float16, torch.float16)
DEEP = 100_000

ABSURD_VALUES = [
    ("unet", "block_out_channels", [10**9, 10**9, 10**9]),
    ("unet", "block_out_channels", [16] * 10**5),
    ("unet", "block_out_channels", []),
    ("unet", "transformer_layers_per_block", [1, 2, 10**9]),
    ("unet", "layers_per_block", 10**9),
    ("unet", "attention_head_dim", [0, 2, 3]),
    ("unet", "in_channels", -4),
    ("unet", "down_block_types", ["os.system"] * 3),
    ("unet", "cross_attention_dim", "2048"),
    ("vae", "latent_channels", 10**300),
    ("vae", "scaling_factor", 1e400),
    ("vae", "norm_num_groups", 0),
    ("vae", "force_upcast", "yes"),
    ("text_encoder_l", "num_hidden_layers", 10**9),
    ("text_encoder_l", "hidden_size", None),
    ("text_encoder_g", "vocab_size", 10**12),
    ("text_encoder_g", "hidden_act", ["gelu"]),
    ("text_encoder_g", "layer_norm_eps", True),
    ("text_encoder_g", "max_position_embeddings", {"a": 1}),
]
IDS = [f"{network}.{key}" for network, key, _ in ABSURD_VALUES]

CONTRADICTIONS = [
    ("unet", "attention_head_dim", [7, 7, 7]),
    ("unet", "norm_num_groups", 7),
    ("vae", "norm_num_groups", 5),
    ("text_encoder_l", "num_attention_heads", 31),
    ("text_encoder_g", "num_attention_heads", 5),
]
"""Values that are possible, but not with the others beside them."""


@pytest.fixture
def noted(tmp_path: Path):
    """`noted(text)` is a file with this note of its architecture."""

    def save(note: str) -> Path:
        path = tmp_path / "strange.safetensors"
        save_file({"weight": torch.zeros(1)}, path, {ARCHITECTURE_KEY: note})
        return path

    return save


@pytest.mark.parametrize(("network", "key", "value"), ABSURD_VALUES, ids=IDS)
def test_an_absurd_note_of_the_architecture_is_refused_with_its_key(network, key, value, noted, sdxl_metadata):
    configs = json.loads(sdxl_metadata[ARCHITECTURE_KEY])
    configs[network][key] = value
    for read in (read_single_file, read_vae):
        with pytest.raises(UserError, match=rf"strange\.safetensors': the metadata key '{ARCHITECTURE_KEY}'") as error:
            read(noted(json.dumps(configs)), HALF if read is read_single_file else None)
        assert len(str(error.value)) < 600


@pytest.mark.parametrize(("network", "key", "value"), CONTRADICTIONS)
def test_a_note_that_contradicts_itself_is_refused(network, key, value, tmp_path, sdxl_tensors, sdxl_metadata):
    configs = json.loads(sdxl_metadata[ARCHITECTURE_KEY])
    configs[network][key] = value
    save_file(sdxl_tensors, tmp_path / "strange.safetensors", {ARCHITECTURE_KEY: json.dumps(configs)})
    with pytest.raises(UserError, match=r"strange\.safetensors'"):
        read_single_file(tmp_path / "strange.safetensors", HALF)


@pytest.mark.parametrize(
    "note",
    [
        "[" * DEEP + "]" * DEEP,
        '{"unet": ' * DEEP,
        "9" * 5000,
        '{"unet": {}, "vae": {}, "text_encoder_l": {}, "text_encoder_g": {}}',
        "\ud83d".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
    ],
    ids=["deep list", "deep object", "long number", "no keys", "no JSON"],
)
def test_a_note_of_any_other_text_is_refused(note, noted):
    with pytest.raises(UserError, match=ARCHITECTURE_KEY):
        read_single_file(noted(note), HALF)


# -- folders ----------------------------------------------------------------------------------------------------------

FOLDERS = {"unet": "unet", "vae": "vae", "text_encoder_l": "text_encoder", "text_encoder_g": "text_encoder_2"}


@pytest.fixture
def folder(tmp_path, sdxl_folder) -> Path:
    shutil.copytree(sdxl_folder, tmp_path / "strange")
    return tmp_path / "strange"


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_diffusers_folder(str(folder), HALF)
    return str(error.value)


@pytest.mark.parametrize(("network", "key", "value"), [*ABSURD_VALUES, *CONTRADICTIONS])
def test_an_absurd_configuration_of_a_folder_is_refused_with_its_network(network, key, value, folder):
    path = folder / FOLDERS[network] / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, key: value}), encoding="utf-8")
    said = refused(folder)
    assert f"{folder}' is not a whole SDXL model in diffusers format: {FOLDERS[network]} cannot be loaded" in said
    assert len(said) < 600
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("network", FOLDERS.values())
@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", "[" * DEEP + "]" * DEEP, '{"a": ' * DEEP + "1" + "}" * DEEP, '{"a": 1' + "0" * 5000 + "}"],
    ids=["empty", "list", "null", "cut short", "deep list", "deep object", "long number"],
)
def test_a_configuration_that_is_no_table_is_refused(network, text, folder):
    (folder / network / "config.json").write_text(text, encoding="utf-8")
    assert f"{network} cannot be loaded" in refused(folder)


@pytest.mark.parametrize("network", FOLDERS.values())
@pytest.mark.parametrize(
    "more",
    [
        {"num_class_embeds": 10**9},
        {"time_embedding_dim": 1e30},
        {"a": [[[10**9]]]},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_absurd_settings_beside_the_known_ones_are_refused(network, more, folder):
    path = folder / network / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **more}), encoding="utf-8")
    assert f"{network} cannot be loaded" in refused(folder)


@pytest.mark.parametrize("text", ["{", "[" * DEEP + "]" * DEEP])
def test_a_damaged_configuration_of_the_scheduler_is_refused(text, folder):
    (folder / "scheduler" / "scheduler_config.json").write_text(text, encoding="utf-8")
    assert f"{folder}/scheduler' cannot be loaded" in refused(folder)


@pytest.mark.parametrize("network", FOLDERS.values())
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.999])
def test_weights_of_a_folder_cut_short_are_refused(network, share, folder):
    [path] = (folder / network).glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert f"{network} cannot be loaded" in refused(folder)


# -- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {1: torch.ones(1), ("a",): torch.ones(1)}},
        {"state_dict": {"a": torch.ones(1).to_sparse()}},
        {"state_dict": {"a": torch.ones(1, device="meta")}},
        {"state_dict": {"a": torch.ones(1).expand(10**12)}},
        {"state_dict": [torch.ones(1)], "metadata": {ARCHITECTURE_KEY: "{}"}},
        {"state_dict": {}, "metadata": {ARCHITECTURE_KEY: 5}},
        {"state_dict": {}, "metadata": {5: "a"}},
        {"state_dict": {}, "metadata": "a"},
        [torch.ones(1)],
        torch.ones(1),
        None,
    ],
    ids=range(11),
)
def test_a_pickle_of_strange_things_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "strange.ckpt")
    with pytest.raises(UserError, match=r"strange\.ckpt'"):
        read_single_file(tmp_path / "strange.ckpt", HALF)


@pytest.mark.parametrize("kind", ["sparse", "complex", "quantised by torch"])
def test_weights_of_a_pickle_that_are_no_plain_floats_are_refused(kind, tmp_path, sdxl_tensors, sdxl_metadata):
    name = "model.diffusion_model.input_blocks.0.0.bias"
    strange = {
        "sparse": torch.ones(16).to_sparse(),
        "complex": torch.ones(16, dtype=torch.complex64),
        "quantised by torch": torch.quantize_per_tensor(torch.ones(16), 0.1, 0, torch.qint8),
    }
    torch.save({"state_dict": {**sdxl_tensors, name: strange[kind]}, "metadata": sdxl_metadata}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt'"):
        read_single_file(tmp_path / "a.ckpt", HALF)


# -- bits and bytes ---------------------------------------------------------------------------------------------------

NUM_DAMAGES = 60


def damaged(whole: bytes, draw: random.Random, within: int) -> bytes:
    """`whole` with a few bits flipped among its first `within` bytes, and sometimes cut short."""
    data = bytearray(whole)
    for _ in range(draw.randint(1, 3)):
        data[draw.randrange(min(within, len(data)))] ^= 1 << draw.randrange(8)
    return bytes(data[: draw.randrange(len(data))]) if draw.random() < 0.2 else bytes(data)


@pytest.mark.filterwarnings("ignore")  # torch warns of some pickles before it refuses them
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_with_flipped_bits_is_read_or_refused(suffix, tmp_path, sdxl_tensors, sdxl_metadata):
    few = {name: tensor for name, tensor in sdxl_tensors.items() if tensor.numel() < 100}
    written = io.BytesIO()
    if suffix == ".ckpt":
        torch.save({"state_dict": few, "metadata": sdxl_metadata}, written)
        whole, within = written.getvalue(), len(written.getvalue())
    else:
        save_file(few, tmp_path / "whole.safetensors", sdxl_metadata)
        whole = (tmp_path / "whole.safetensors").read_bytes()
        within = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    for _ in range(NUM_DAMAGES):
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(damaged(whole, draw, within))
        with suppress(UserError):  # (the U-Net takes a second to build, and goes the same way)
            read_vae(path, None)
