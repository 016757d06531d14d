"""Two captions to conditioning: against diffusers, against OpenCLIP, and each encoder apart from the other."""

import copy

import pytest
import torch
from open_clip.model import CLIPTextCfg, _build_text_tower
from safetensors.torch import load_file

from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.sdxl.text_encoding import encode_captions, encode_g, encode_l, use_legacy_text_projection
from library.sdxl.tokenizers import tokenize_captions
from library.sdxl.weight_names import LOGIT_SCALE, PREFIX_G

CAPTIONS_L = ["photographic, studio portrait", "anime"]
CAPTIONS_G = ["woman, portrait, in nature", "a photo of a cat!"]
LONG = "a very long caption of many words, " * 20  # 160 tokens: three chunks
# In float64 the order of sums shows in the 13th digit or so; float32 would need a tolerance near the effects tested.
EXACT_BUT_FOR_ORDER_OF_SUMS = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(sdxl_file):
    """The encoders in float64."""
    return read_single_file(sdxl_file, ModelDtypes(text_encoder_l=torch.float64, text_encoder_g=torch.float64))


@pytest.fixture(scope="module")
def encode(model):
    """Captions of L and G to conditioning, through the whole path."""

    def encode(captions_l, captions_g, num_chunks=1):
        tokens = tokenize_captions(captions_l, captions_g, num_chunks)
        return encode_captions(model.text_encoder_l, model.text_encoder_g, tokens)

    return encode


@pytest.fixture(scope="module")
def width_l(model):
    """How many features are L's: 768 of the real 2048."""
    return model.text_encoder_l.config.hidden_size


# -- against diffusers ------------------------------------------------------------------------------------------------


def test_conditioning_is_that_of_diffusers_with_prompt_for_l_and_prompt_2_for_g(diffusers_pipeline):
    hidden, _, pooled, _ = diffusers_pipeline.encode_prompt(
        prompt=CAPTIONS_L, prompt_2=CAPTIONS_G, device="cpu", do_classifier_free_guidance=False
    )
    tokens = tokenize_captions(CAPTIONS_L, CAPTIONS_G, num_chunks=1)
    ours = encode_captions(diffusers_pipeline.text_encoder, diffusers_pipeline.text_encoder_2, tokens)
    # Exact: the same networks see the same ids.
    assert torch.equal(ours.hidden, hidden)
    assert torch.equal(ours.pooled, pooled)


# -- against OpenCLIP -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openclip_g(sdxl_tensors_of_g, model):
    """OpenCLIP's own text tower with the tensors of the file."""
    config = model.text_encoder_g.config
    tower = _build_text_tower(
        config.projection_dim,
        CLIPTextCfg(width=config.hidden_size, heads=config.num_attention_heads, layers=config.num_hidden_layers),
    ).double()
    tower.load_state_dict(sdxl_tensors_of_g)
    return tower.eval()


@pytest.fixture(scope="module")
def sdxl_tensors_of_g(sdxl_file):
    """G's tensors of the single file in the names of OpenCLIP."""
    tensors = load_file(sdxl_file)
    return {
        name.removeprefix(PREFIX_G): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX_G) and name != LOGIT_SCALE
    }


@pytest.fixture(scope="module")
def tokens_g():
    return tokenize_captions([""], [*CAPTIONS_G, "", LONG], num_chunks=1).tokens_g


def test_gs_hidden_state_is_openclips_before_the_last_block(model, openclip_g, tokens_g):
    state = openclip_g.token_embedding(tokens_g[:, 0]) + openclip_g.positional_embedding
    for block in openclip_g.transformer.resblocks[:-1]:
        state = block(state, attn_mask=openclip_g.attn_mask)
    hidden, _ = encode_g(model.text_encoder_g, tokens_g)
    torch.testing.assert_close(hidden, state, **EXACT_BUT_FOR_ORDER_OF_SUMS)


def test_the_pooled_vector_is_openclips_x_times_text_projection(model, openclip_g, tokens_g):
    _, pooled = encode_g(model.text_encoder_g, tokens_g)
    torch.testing.assert_close(pooled, openclip_g(tokens_g[:, 0]), **EXACT_BUT_FOR_ORDER_OF_SUMS)


def test_with_the_projection_transposed_the_pooled_vector_would_be_another(model, openclip_g, tokens_g):
    mistaken = copy.deepcopy(model.text_encoder_g)
    mistaken.text_projection.weight.copy_(model.text_encoder_g.text_projection.weight.T)
    _, pooled = encode_g(mistaken, tokens_g)
    difference = (pooled - openclip_g(tokens_g[:, 0])).norm() / pooled.norm()
    assert difference > 0.5  # as different as unrelated vectors


def test_legacy_text_projection_multiplies_by_the_transposed_matrix_and_keeps_the_weights(model, openclip_g, tokens_g):
    legacy = copy.deepcopy(model.text_encoder_g)
    use_legacy_text_projection(legacy)
    mistaken = copy.deepcopy(openclip_g)
    mistaken.text_projection.copy_(openclip_g.text_projection.T)
    hidden, pooled = encode_g(legacy, tokens_g)
    torch.testing.assert_close(pooled, mistaken(tokens_g[:, 0]), **EXACT_BUT_FOR_ORDER_OF_SUMS)
    assert torch.equal(hidden, encode_g(model.text_encoder_g, tokens_g)[0])
    weights = model.text_encoder_g.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in legacy.state_dict().items())


# -- L and G apart ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_changing_only_the_g_caption_leaves_ls_features_exactly_as_they_were(encode, width_l, num_chunks):
    before = encode(["photographic"], ["woman, portrait"], num_chunks)
    after = encode(["photographic"], ["woman, landscape"], num_chunks)
    assert torch.equal(after.hidden[..., :width_l], before.hidden[..., :width_l])
    assert not torch.equal(after.hidden[..., width_l:], before.hidden[..., width_l:])
    assert not torch.equal(after.pooled, before.pooled)


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_changing_only_the_l_caption_leaves_gs_features_and_the_pooled_vector_exactly_as_they_were(
    encode, width_l, num_chunks
):
    before = encode(["photographic"], ["woman, portrait"], num_chunks)
    after = encode(["anime"], ["woman, portrait"], num_chunks)
    assert not torch.equal(after.hidden[..., :width_l], before.hidden[..., :width_l])
    assert torch.equal(after.hidden[..., width_l:], before.hidden[..., width_l:])
    assert torch.equal(after.pooled, before.pooled)


def test_each_pair_of_a_batch_is_encoded_as_if_alone(encode):
    together = encode(CAPTIONS_L, CAPTIONS_G)
    for index, (caption_l, caption_g) in enumerate(zip(CAPTIONS_L, CAPTIONS_G, strict=True)):
        alone = encode([caption_l], [caption_g])
        torch.testing.assert_close(together.hidden[index], alone.hidden[0], **EXACT_BUT_FOR_ORDER_OF_SUMS)
        torch.testing.assert_close(together.pooled[index], alone.pooled[0], **EXACT_BUT_FOR_ORDER_OF_SUMS)


# -- long captions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chunks", [2, 3])
def test_chunks_are_joined_between_the_first_start_and_the_last_end(model, num_chunks):
    tokens_l = tokenize_captions([LONG, "anime"], [""], num_chunks).tokens_l
    joined = encode_l(model.text_encoder_l, tokens_l)
    chunks = [encode_l(model.text_encoder_l, tokens_l[:, [index]]) for index in range(num_chunks)]
    expected = [chunks[0][:, :1], *(chunk[:, 1:76] for chunk in chunks), chunks[-1][:, 76:]]
    assert joined.shape[:2] == (2, 75 * num_chunks + 2)
    torch.testing.assert_close(joined, torch.cat(expected, dim=1), **EXACT_BUT_FOR_ORDER_OF_SUMS)


def test_gs_chunks_are_joined_alike_and_its_pooled_vector_is_the_first_chunks(model):
    tokens_g = tokenize_captions([""], [LONG, "a cat"], num_chunks=3).tokens_g
    joined, pooled = encode_g(model.text_encoder_g, tokens_g)
    first, pooled_of_first = encode_g(model.text_encoder_g, tokens_g[:, :1])
    last, _ = encode_g(model.text_encoder_g, tokens_g[:, 2:])
    torch.testing.assert_close(joined[:, :76], first[:, :76], **EXACT_BUT_FOR_ORDER_OF_SUMS)
    torch.testing.assert_close(joined[:, -76:], last[:, 1:], **EXACT_BUT_FOR_ORDER_OF_SUMS)
    torch.testing.assert_close(pooled, pooled_of_first, **EXACT_BUT_FOR_ORDER_OF_SUMS)


def test_features_of_l_come_before_those_of_g(encode, model, width_l):
    tokens = tokenize_captions(["anime"], ["a cat"], 1)
    hidden = encode(["anime"], ["a cat"]).hidden
    assert torch.equal(hidden[..., :width_l], encode_l(model.text_encoder_l, tokens.tokens_l))
    assert torch.equal(hidden[..., width_l:], encode_g(model.text_encoder_g, tokens.tokens_g)[0])
