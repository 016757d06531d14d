"""Cached text encoder outputs: those of the encoders bit for bit, each text once, and nothing stale or damaged used."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.config.errors import UserError
from library.data.caption_tokens import CaptionTokenizer, tokenizer_for
from library.data.latent_cache import CachedLatents
from library.data.text_cache import CachedTexts, OutputsOnDisk, encode_texts, tokens_digest
from library.data.training_images import TrainingImage
from library.images.crops import Crop
from library.sdxl.architecture import SdxlModel
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file
from library.sdxl.sizes import Size
from library.sdxl.text_encoding import encode_captions, text_encoder_digest, use_legacy_text_projection
from library.sdxl.tokenizers import PAD_L, tokenize, tokenize_captions
from tests.training_images import image_of, rules_of_length, with_rules

# Two L captions, three G captions. The last two G captions are the same to the tokenizer.
CAPTIONS = [("photographic", "a cat"), ("photographic", "a dog"), ("anime", "a cat"), ("anime", "A  DOG")]


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path, request: pytest.FixtureRequest) -> SdxlModel:
    """The tiny SDXL with its encoders in float32, or in what the test asks for."""
    dtype = getattr(request, "param", torch.float32)
    return read_single_file(tiny_sdxl, ModelDtypes(text_encoder_l=dtype, text_encoder_g=dtype))


in_both_precisions = pytest.mark.parametrize("model", [torch.float32, torch.bfloat16], indirect=True, ids=str)


@pytest.fixture
def calls(model: SdxlModel):
    """How many captions each encoder has been given."""
    counts = {"L": 0, "G": 0}

    def counting(name):
        def count(module, args, kwargs):
            counts[name] += len(args[0])

        return count

    encoders = {"L": model.text_encoder_l, "G": model.text_encoder_g}
    hooks = [encoder.register_forward_pre_hook(counting(name), with_kwargs=True) for name, encoder in encoders.items()]
    yield counts
    for hook in hooks:
        hook.remove()


def images_of(captions=CAPTIONS) -> list[TrainingImage]:
    size = Size(64, 64)
    latents = CachedLatents(torch.zeros(4, 8, 8).numpy(), size, (0, 0, 64, 64))
    return [
        image_of(str(index), caption_l, caption_g, size, size, Crop(0, 0, 0), latents)
        for index, (caption_l, caption_g) in enumerate(captions)
    ]


def tokens_of(captions=CAPTIONS) -> CaptionTokenizer:
    return tokenizer_for(image.subset for image in images_of(captions))


def encoders_of(model: SdxlModel):
    return model.text_encoder_l, model.text_encoder_g


def encode(model: SdxlModel, folder: Path | None = None, captions=CAPTIONS, num_chunks=1) -> CachedTexts:
    images = with_rules(images_of(captions), rules_of_length(num_chunks))
    texts, _ = encode_texts(
        images, tokenizer_for(image.subset for image in images), *encoders_of(model), seed=0, folder=folder
    )
    return texts


def from_cache(texts: CachedTexts, captions, num_chunks=1):
    """The conditioning of a batch without any encoder."""
    tokens = tokenize_captions(*zip(*captions, strict=True), num_chunks)
    return encode_captions(None, None, tokens, texts.of(tokens, *[[False] * len(captions)] * 2))


def by_encoders(model: SdxlModel, captions, num_chunks=1):
    with torch.no_grad():
        tokens = tokenize_captions(*zip(*captions, strict=True), num_chunks)
        return encode_captions(model.text_encoder_l, model.text_encoder_g, tokens)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.safetensors")}


# -- what is cached ---------------------------------------------------------------------------------------------------


@in_both_precisions
@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_cached_outputs_are_those_of_the_encoders_bit_for_bit(model, num_chunks, on_disk, tmp_path):
    texts = encode(model, tmp_path if on_disk else None, num_chunks=num_chunks)
    for pair in CAPTIONS:
        cached, expected = from_cache(texts, [pair], num_chunks), by_encoders(model, [pair], num_chunks)
        assert torch.equal(cached.hidden, expected.hidden)
        assert torch.equal(cached.pooled, expected.pooled)
        assert cached.hidden.dtype == expected.hidden.dtype


@in_both_precisions
def test_a_batch_is_its_captions_one_by_one_and_near_those_encoded_together(model):
    texts = encode(model)
    batch, together = from_cache(texts, CAPTIONS), by_encoders(model, CAPTIONS)
    for index, pair in enumerate(CAPTIONS):
        alone = from_cache(texts, [pair])
        assert torch.equal(batch.hidden[index], alone.hidden[0])
        assert torch.equal(batch.pooled[index], alone.pooled[0])
    # Matrix products of another size may add up in another order: a few roundings of the format, over 32 blocks.
    tolerance = 30 * torch.finfo(batch.hidden.dtype).eps
    assert (batch.hidden - together.hidden).norm() < tolerance * together.hidden.norm()
    assert (batch.pooled - together.pooled).norm() < tolerance * together.pooled.norm()


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_each_encoder_sees_each_of_its_own_texts_once(model, calls, on_disk, tmp_path):
    encode(model, tmp_path if on_disk else None)
    assert calls == {"L": 2, "G": 2}


def test_an_encoder_that_is_left_out_is_not_cached(model, calls):
    texts, notes = encode_texts(images_of(), tokens_of(), model.text_encoder_l, None, seed=0, folder=None)
    assert calls == {"L": 2, "G": 0}
    tokens = tokenize_captions(["anime"], ["a cat"], 1)
    encoded = texts.of(tokens, [False], [False])
    assert encoded.hidden_l is not None
    assert (encoded.hidden_g, encoded.pooled_g) == (None, None)
    assert notes == ["text encoder L: 2 different captions, encoded"]


def test_outputs_that_are_no_numbers_are_named_with_their_caption(model):
    norm = model.text_encoder_g.text_projection.weight
    before = norm.data.clone()
    norm.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="text encoder G returns NaN or Inf for the caption 'a cat'"):
        encode(model)
    norm.data = before


# -- on disk ----------------------------------------------------------------------------------------------------------


def test_a_second_run_reads_what_the_first_has_written(model, calls, tmp_path):
    encode(model, tmp_path)
    written = files(tmp_path)
    assert len(written) == 4
    calls |= {"L": 0, "G": 0}
    texts, notes = encode_texts(
        images_of(), tokens_of(), model.text_encoder_l, model.text_encoder_g, seed=0, folder=tmp_path
    )
    assert calls == {"L": 0, "G": 0}
    assert files(tmp_path) == written
    assert [note.partition(", ")[2].partition(" in ")[0] for note in notes] == ["0 encoded, 2 found"] * 2
    assert torch.equal(from_cache(texts, CAPTIONS).hidden, from_cache(encode(model), CAPTIONS).hidden)


def test_an_edited_caption_costs_one_encoding_of_its_own_encoder(model, calls, tmp_path):
    encode(model, tmp_path)
    calls |= {"L": 0, "G": 0}
    edited = [("photographic, grain", "a cat"), *CAPTIONS[1:]]
    texts = encode(model, tmp_path, edited)
    assert calls == {"L": 1, "G": 0}
    assert torch.equal(from_cache(texts, edited[:1]).hidden, by_encoders(model, edited[:1]).hidden)


def test_another_length_is_another_text(model, calls, tmp_path):
    encode(model, tmp_path)
    calls |= {"L": 0, "G": 0}
    encode(model, tmp_path, num_chunks=2)
    assert calls == {"L": 2 * 2, "G": 2 * 2}  # the encoders see two chunks of each


def test_other_weights_are_noticed_and_neither_model_disturbs_the_other(model, calls, tmp_path):
    encode(model, tmp_path)
    written = files(tmp_path)
    weight = model.text_encoder_l.state_dict()["encoder.layers.0.mlp.fc1.bias"]
    before = weight[0].clone()
    weight[0] = torch.nextafter(before, before + 1)
    calls |= {"L": 0, "G": 0}
    encode(model, tmp_path)
    weight[0] = before
    assert calls == {"L": 2, "G": 0}
    assert files(tmp_path).items() > written.items()


def damaged_at_every_byte(path: Path):
    """The file with each byte of its header, and some of its numbers, changed; cut short; empty."""
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    yield b""
    for length in (4, header - 1, header, len(whole) - 1):
        yield whole[:length]
    for position in [*range(header), header, (header + len(whole)) // 2, len(whole) - 1]:
        yield whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]


def test_wherever_a_file_is_damaged_it_is_named(model, tmp_path):
    encode(model, tmp_path, CAPTIONS[:1])
    path = next(path for path in files(tmp_path) if path.parent.name.startswith("g-"))
    cache = encode(model, tmp_path, CAPTIONS[:1]).outputs_g
    assert isinstance(cache, OutputsOnDisk)
    for content in damaged_at_every_byte(path):
        path.write_bytes(content)
        with pytest.raises(UserError, match=path.stem):
            cache.read(path.stem)


def test_a_damaged_file_and_one_under_a_wrong_name_are_named_counted_and_made_again(model, calls, tmp_path, capsys):
    encode(model, tmp_path)
    written = files(tmp_path)
    of_l = [path for path in written if path.parent.name.startswith("l-")]
    of_l[0].write_bytes(written[of_l[1]])
    of_g = next(path for path in written if path.parent.name.startswith("g-"))
    of_g.write_bytes(written[of_g][:-1])
    calls |= {"L": 0, "G": 0}
    _, notes = encode_texts(
        images_of(), tokens_of(), model.text_encoder_l, model.text_encoder_g, seed=0, folder=tmp_path
    )
    assert calls == {"L": 1, "G": 1}
    assert files(tmp_path) == written
    assert all("1 encoded (1 of them again), 1 found" in note for note in notes)
    said = capsys.readouterr().err
    assert f"'{of_l[0]}' is damaged, or does not hold what its name says. It is encoded again." in said
    assert f"'{of_g}' is not a whole safetensors file" in said


def test_a_file_that_goes_while_training_is_named_with_the_remedy(model, tmp_path):
    texts = encode(model, tmp_path)
    key = tokens_digest(torch.tensor(tokenize("anime", PAD_L, 1).ids))
    path = texts.outputs_l.path(key)
    path.unlink()
    with pytest.raises(UserError) as caught:
        from_cache(texts, [("anime", "a cat")])
    assert str(path) in caught.value.problem
    assert "--resume" in caught.value.remedy


def test_the_legacy_projection_has_outputs_of_its_own(tiny_sdxl: Path, tmp_path):
    model = read_single_file(tiny_sdxl, ModelDtypes())
    before = text_encoder_digest(model.text_encoder_g)
    use_legacy_text_projection(model.text_encoder_g)
    assert text_encoder_digest(model.text_encoder_g) != before


def test_a_full_disk_is_said_before_anything_is_encoded(model, calls, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="to write outputs of text encoder L for 2 captions takes"):
        encode(model, tmp_path)
    assert calls == {"L": 0, "G": 0}
