"""The captioner on photographs, from the command line to the files: with tiny models of random weights."""

import re

import pytest
from transformers import CLIPTextConfig, CLIPTextModel

from finetune import make_captions as script
from finetune import sdxl_merge_captions_g_to_metadata
from library.annotation.sentence_options import EXTENSIONS
from library.data.metadata import COLUMN_G, COLUMN_L
from tests.annotation.conftest import PHOTOGRAPHS, captions_in, merged_captions, run
from tests.annotation.tiny_captioners import write_git, write_llava
from tests.reliability.refusal import said_on_refusal
from tests.two_processes import in_two_processes

pytestmark = pytest.mark.heavy


def caption(folder, model, *flags):
    return run(script, folder, f"--model_name_or_path={model}", "--max_new_tokens=6", *flags)


def test_an_image_to_text_model_captions_photographs_for_the_merge_script(photographs, blip, capsys):
    assert caption(photographs, blip, "--batch_size=2", "--prompt=a photo of") == 0
    written = captions_in(photographs, ".caption")
    assert sorted(written) == [f"{name}.caption" for name in PHOTOGRAPHS]
    assert all(re.fullmatch(r"a photo of( [a-z]+)*\n", text) for text in written.values())
    assert len(set(written.values())) > 1  # what is seen matters
    printed = capsys.readouterr().out
    assert "wrote 5 .caption files" in printed and "captions  tokens\n         5  1-25" in printed
    assert merged_captions(sdxl_merge_captions_g_to_metadata, photographs, COLUMN_G) == written


def test_a_chat_model_is_handed_the_tags_of_l(photographs, llava, capsys):
    assert caption(photographs, llava, "--batch_size=3") == 0
    plain = captions_in(photographs, ".caption")
    for name in PHOTOGRAPHS[1:]:
        (photographs / f"{name}.txt").write_text("red, blue sky\n", encoding="utf-8")
    assert caption(photographs, llava, "--batch_size=3", "--also_read=l", "--overwrite") == 0
    with_tags = captions_in(photographs, ".caption")
    assert with_tags["astronaut.caption"] == plain["astronaut.caption"]  # it has none
    assert all(with_tags[f"{name}.caption"] != plain[f"{name}.caption"] for name in PHOTOGRAPHS[1:])
    assert (
        "1 images were captioned without a text of L, which they do not have: astronaut.png" in capsys.readouterr().err
    )
    placed = ["--also_read=l", "--overwrite", "--prompt=Describe {tags}"]
    assert caption(photographs, llava, "--batch_size=3", *placed) == 0
    assert captions_in(photographs, ".caption") != with_tags


def test_what_is_drawn_for_an_image_depends_on_seed_and_image_alone(photographs, llava):
    drawing = ["--do_sample", "--top_p=0.95", "--temperature=1.5", "--overwrite"]
    assert caption(photographs, llava, "--batch_size=4", *drawing) == 0
    drawn = captions_in(photographs, ".caption")
    (photographs / "chelsea.caption").unlink()
    assert caption(photographs, llava, "--batch_size=1", *drawing[:-1]) == 0
    assert captions_in(photographs, ".caption") == drawn
    assert caption(photographs, llava, "--batch_size=4", *drawing, "--seed=1") == 0
    assert captions_in(photographs, ".caption") != drawn


@pytest.mark.slow
def test_two_processes_write_what_one_does(photographs, llava):
    flags = [f"--model_name_or_path={llava}", "--max_new_tokens=6", "--batch_size=2", "--do_sample"]
    assert run(script, photographs, *flags) == 0
    alone = captions_in(photographs, ".caption")
    for file in alone:
        (photographs / file).unlink()
    statuses, out, _ = in_two_processes(script, photographs, *flags)
    assert captions_in(photographs, ".caption") == alone
    assert statuses == [0, 0] and out.count("wrote 5 .caption files") == 1


def test_git_takes_a_beginning_and_beams(photographs, tmp_path_factory):
    git = write_git(tmp_path_factory.mktemp("git"))
    assert caption(photographs, git, "--batch_size=2", "--prompt=a photo of", "--num_beams=2") in (0, 1)
    assert all(text.startswith("a photo of") for text in captions_in(photographs, ".caption").values())


@pytest.mark.parametrize(
    ("said", "reason"), [("I'm sorry, I cannot", "because the model refused"), ("", "because the model said nothing")]
)
def test_refusals_and_empty_answers_are_named_and_not_written(said, reason, photographs, tmp_path, capsys):
    model = write_llava(tmp_path / "model", always=said)
    (photographs / "cat.caption").write_text("mine\n", encoding="utf-8")
    assert caption(photographs, model, "--batch_size=4") == 1
    assert captions_in(photographs, ".caption") == {"cat.caption": "mine\n"}
    assert f"4 images have no caption {reason}: astronaut.png, chelsea.png, coffee.png" in capsys.readouterr().err


def test_a_caption_that_the_limit_of_tokens_cut_is_named(photographs, tmp_path, capsys):
    model = write_llava(tmp_path / "model", always="cat")
    assert caption(photographs, model) == 0
    assert set(captions_in(photographs, ".caption").values()) == {"cat cat cat cat cat cat\n"}
    assert "5 captions end where --max_new_tokens cut them" in capsys.readouterr().err


BAD_COMMANDS = [
    ([], "--model_name_or_path is missing"),
    (["--model_name_or_path={blip}", "--also_read=l"], "blip cannot be handed other texts"),
    (["--model_name_or_path={blip}", "--do_sample", "--num_beams=2"], "Keep one of them"),
    (["--model_name_or_path={blip}", "--prompt={tags}"], "add --also_read l"),
    (["--model_name_or_path={blip}", "--also_read=g"], "--also_read g reads the .caption files"),
    (["--model_name_or_path={blip}", "--min_new_tokens=130"], "more than --max_new_tokens 75"),
    (
        ["--model_name_or_path={blip}", "--max_new_tokens=128"],
        "blip has room for 128 tokens, and --max_new_tokens is 128",
    ),
    (["--model_name_or_path={other}"], "is a model of another kind (clip_text_model)"),
    (["--model_name_or_path={images}"], "is no model of transformers"),
    (["--model_name_or_path={damaged}"], "cannot be opened"),
    (["--model_name_or_path=somebody/model"], "is not on this machine and cannot be fetched"),
]


@pytest.mark.parametrize(("flags", "said"), BAD_COMMANDS, ids=lambda value: str(value)[:50])
def test_a_mistake_is_one_clear_line(flags, said, photographs, blip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    other, damaged = tmp_path / "other", tmp_path / "damaged"
    if "{other}" in str(flags):
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        CLIPTextModel(CLIPTextConfig(**small, vocab_size=16)).save_pretrained(other)
    damaged.mkdir()
    for file in blip.iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[:200] if file.suffix == ".safetensors" else content)
    places = {"{blip}": blip, "{other}": other, "{images}": photographs, "{damaged}": damaged}
    for name, place in places.items():
        flags = [flag.replace(name, str(place)) for flag in flags]
    assert said in said_on_refusal(script, [str(photographs), *flags], capsys)
    assert captions_in(photographs, ".caption") == {}


def test_the_suffixes_are_those_of_the_metadata():
    assert {"l": COLUMN_L.caption_extension, "g": COLUMN_G.caption_extension} == EXTENSIONS
