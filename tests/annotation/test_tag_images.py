"""The tagger on photographs, from the command line to the files: with a model whose outputs are known."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import sdxl_merge_captions_l_to_metadata
from finetune import tag_images_by_wd14_tagger as script
from library.annotation.tag_choice import read_labels, tag_choice
from library.annotation.tag_options import TagOptions
from library.annotation.tagger import open_tagger
from library.data.metadata import COLUMN_L
from library.training.run_lock import run_lock
from tests.annotation.conftest import PHOTOGRAPHS, captions_in, merged_captions, run
from tests.annotation.file_server import serving
from tests.annotation.killed_run import run_and_kill
from tests.annotation.tiny_tagger import LABELS, probabilities_of, write_tagger
from tests.reliability.refusal import said_on_refusal
from tests.two_processes import in_two_processes


def tag(folder, tagger, *flags):
    return run(script, folder, f"--model_dir={tagger}", *flags)


def expected_tags(colour, **options):
    labels = read_labels_of_the_model()
    return ", ".join(tag_choice(labels, TagOptions(**options)).tags_of(probabilities_of(colour)).written)


def read_labels_of_the_model():
    from library.annotation.tag_choice import Label

    return [Label(name, str(category)) for name, category, *_ in LABELS]


COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (10, 10, 240), "white": (255, 255, 255)}


@pytest.fixture
def colours(tmp_path):
    """Squares of one colour each, for which the outputs of the model are known."""
    folder = tmp_path / "colours"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
    return folder


def test_the_tags_are_those_of_the_outputs_of_the_model(colours, tagger):
    assert tag(colours, tagger, "--use_rating_tags", "--remove_underscore", "--character_tag_expand") == 0
    written = captions_in(colours, ".txt")
    options = {"use_rating_tags": True, "remove_underscore": True, "character_tag_expand": True}
    assert written == {f"{name}.txt": f"{expected_tags(colour, **options)}\n" for name, colour in COLOURS.items()}
    assert written["red.txt"] == "sensitive, red light, ^_^, red riding hood (wolf), tales\n"
    assert written["blue.txt"] == "general, blue light, ^_^, blue beard, tales\n"


def test_images_are_upright_and_on_white_squares(tmp_path, tagger):
    opened = open_tagger(
        tagger / "model.onnx", tag_choice(read_labels(tagger / "selected_tags.csv"), TagOptions()), ", "
    )
    wide = Image.new("RGBA", (64, 32), (0, 0, 255, 255))
    wide.paste((0, 0, 0, 0), (0, 0, 32, 32))  # transparent on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is on the right
    wide.save(tmp_path / "wide.png", exif=exif)
    square = opened.load(tmp_path / "wide.png")
    assert square.shape == (16, 16, 3)
    assert (square[:, :4] == 255).all()  # what fills the square
    assert (square[:, 12:] == 255).all()
    assert (square[:6, 4:12] == 255).all()  # the transparent half is on top now
    assert np.array_equal(square[10:, 4:12], np.broadcast_to([255, 0, 0], (6, 8, 3)))  # blue first


def test_photographs_are_tagged_and_merged(photographs, tagger, capsys):
    assert tag(photographs, tagger, "--frequency_tags") == 0
    printed = capsys.readouterr().out
    written = captions_in(photographs, ".txt")
    assert sorted(written) == [f"{name}.txt" for name in PHOTOGRAPHS]
    counts = dict(re.findall(r"^ +(\d+)  (\S+)$", printed, re.MULTILINE))
    every = [each for text in written.values() for each in text.strip().split(", ")]
    assert {int(count) for count in counts} == {every.count(each) for each in every}
    assert "wrote 5 .txt files" in printed and "images a second" in printed
    assert merged_captions(sdxl_merge_captions_l_to_metadata, photographs, COLUMN_L) == written


def test_existing_files_are_skipped_replaced_or_added_to(colours, tagger, capsys):
    (colours / "red.txt").write_text("mine, ^_^", encoding="utf-8")
    (colours / "blue.txt").write_bytes(b"")
    assert tag(colours, tagger) == 0
    assert "2 were there already" in capsys.readouterr().out
    assert (colours / "red.txt").read_text(encoding="utf-8") == "mine, ^_^"
    assert (colours / "blue.txt").read_bytes() == b""
    assert tag(colours, tagger) == 0
    assert "all 4 images" in capsys.readouterr().out
    assert tag(colours, tagger, "--append_tags") == 0
    assert (colours / "red.txt").read_text(encoding="utf-8") == "mine, ^_^, red_light, red_riding_hood_(wolf)_(tales)\n"
    assert tag(colours, tagger, "--overwrite") == 0
    assert (colours / "red.txt").read_text(encoding="utf-8") == f"{expected_tags(COLOURS['red'])}\n"


def test_subfolders_and_another_extension(colours, tagger):
    (colours / "below").mkdir()
    (colours / "red.png").rename(colours / "below" / "red.png")
    assert tag(colours, tagger, "--caption_extention=.caption") == 0
    assert "below/red.caption" not in captions_in(colours, ".caption")
    assert tag(colours, tagger, "--caption_extension=.caption", "--recursive") == 0
    assert captions_in(colours, ".caption")["below/red.caption"] == f"{expected_tags(COLOURS['red'])}\n"


def test_a_model_made_for_batches_of_three_is_given_three(colours, tmp_path, capsys):
    assert tag(colours, write_tagger(tmp_path / "of three", batch=3)) == 0
    assert captions_in(colours, ".txt")["white.txt"] == f"{expected_tags(COLOURS['white'])}\n"
    assert "made for batches of 3" in capsys.readouterr().err


def test_a_damaged_image_is_named_and_the_others_are_tagged(colours, tagger, capsys):
    (colours / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    assert tag(colours, tagger, "--batch_size=2") == 1
    assert "1 images could not be used:" in (said := capsys.readouterr().err) and "broken.jpg" in said
    assert sorted(captions_in(colours, ".txt")) == sorted(f"{name}.txt" for name in COLOURS)


def test_captions_longer_than_an_encoder_reads_are_named(tmp_path, tagger, capsys):
    Image.new("RGB", (16, 16), COLOURS["red"]).save(tmp_path / "red.png")
    assert tag(tmp_path, tagger, f"--tag_replacement=red_light,{'very ' * 80}red") == 0
    assert re.search(r"1 captions are longer than 75 tokens: red.png \(9\d\)", capsys.readouterr().err)


def test_debug_prints_the_tags_by_their_kind(colours, tagger, capsys):
    assert tag(colours, tagger, "--debug") == 0
    printed = capsys.readouterr().out
    assert "red.png: rating: sensitive; characters: red_riding_hood_(wolf)_(tales); general: red_light, ^_^" in printed


def test_a_killed_run_leaves_whole_files_and_the_next_one_goes_on(photographs, tagger):
    run_and_kill("finetune.tag_images_by_wd14_tagger", photographs, f"--model_dir={tagger}", "--batch_size=2", at=3)
    before = captions_in(photographs, ".txt")
    assert len(before) == 2
    assert list(photographs.glob("*.partial"))
    assert tag(photographs, tagger) == 0
    resumed = captions_in(photographs, ".txt")
    assert len(resumed) == 5 and before.items() <= resumed.items()
    assert not list(photographs.glob("*.partial"))
    assert tag(photographs, tagger, "--overwrite") == 0
    assert captions_in(photographs, ".txt") == resumed


def test_two_processes_write_what_one_does_and_report_together(photographs, tagger):
    assert tag(photographs, tagger, "--batch_size=2") == 0
    alone = captions_in(photographs, ".txt")
    (photographs / "broken.png").write_bytes(b"no image")
    for file in alone:
        (photographs / file).unlink()
    statuses, out, err = in_two_processes(script, photographs, f"--model_dir={tagger}", "--batch_size=2", "--overwrite")
    assert captions_in(photographs, ".txt") == alone
    assert statuses == [1, 1]
    assert out.count("wrote 5 .txt files") == 1  # by both, said once
    assert err.count("1 images could not be used") == 1


BAD_COMMANDS = [
    (["--model_dir=nowhere"], "there is no model.onnx in 'nowhere'"),
    (["--thresh=2"], "--thresh is 2.0; it must be 1 or less"),
    (["--use_rating_tags", "--use_rating_tags_as_last_tag"], "exclude each other"),
    (["--append_tags", "--overwrite"], "--append_tags keeps what --overwrite replaces"),
    (["--tag_replacement=a,b;c"], "--tag_replacement expects old,new;old,new, not 'c'"),
    (["--caption_extension=txt"], "--caption_extension is 'txt': it must begin with a dot"),
    (["--caption_separator= "], "--caption_separator must hold a character that is no space"),
    (["--pin_memory"], "--pin_memory"),
    (["--force_download"], "--force_download needs --repo_id"),
    (["--onnx=false"], "TensorFlow"),
]


@pytest.mark.parametrize(("flags", "said"), BAD_COMMANDS, ids=lambda value: str(value)[:40])
def test_a_mistake_on_the_command_line_is_one_clear_line(flags, said, colours, monkeypatch, capsys):
    monkeypatch.chdir(colours.parent)
    assert said in said_on_refusal(script, [str(colours), *flags], capsys)
    assert captions_in(colours, ".txt") == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"channels_first": True}, "is no tagger of the WD14 kind: it takes image"),
        ({"num_outputs": 9}, "the labels do not fit the model"),
        ({"ends_in_sigmoid": False}, "which are no probabilities"),
    ],
)
def test_a_model_of_another_kind_is_refused(settings, said, colours, tmp_path, capsys):
    other = write_tagger(tmp_path / "other", **settings)
    assert said in said_on_refusal(script, [str(colours), f"--model_dir={other}"], capsys)


def test_a_model_that_is_damaged_or_without_labels_is_refused(colours, tagger, tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes((tagger / "model.onnx").read_bytes()[:100])
    (tmp_path / "selected_tags.csv").write_bytes((tagger / "selected_tags.csv").read_bytes())
    argv = [str(colours), f"--model_dir={tmp_path}"]
    assert "cannot be read as an ONNX model" in said_on_refusal(script, argv, capsys)
    (tmp_path / "selected_tags.csv").unlink()
    assert "selected_tags.csv" in said_on_refusal(script, argv, capsys)


def test_a_hub_model_without_a_network_is_one_clear_line(colours, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    argv = [str(colours), "--repo_id=somebody/tagger", f"--model_dir={colours.parent / 'models'}"]
    assert "'somebody/tagger' is not on this machine and cannot be downloaded" in said_on_refusal(script, argv, capsys)


def test_a_model_of_the_hub_is_downloaded_once(colours, tagger, tmp_path, monkeypatch, capsys):
    models = tmp_path / "models"
    with serving("somebody/tagger", tagger) as (address, downloaded):
        monkeypatch.setenv("HF_ENDPOINT", address)
        for more in ([], ["--overwrite"], ["--overwrite", "--force_download"]):
            assert tag(colours, models, "--repo_id=somebody/tagger", *more) == 0
        assert sorted(downloaded) == ["model.onnx"] * 2 + ["selected_tags.csv"] * 2  # at first, and by force
        assert (models / "somebody_tagger" / "model.onnx").read_bytes() == (tagger / "model.onnx").read_bytes()
        (colours / "red.txt").unlink()
        argv = [str(colours), "--repo_id=somebody/other", f"--model_dir={models}"]
        assert "the hub has no file 'selected_tags.csv' of a model" in said_on_refusal(script, argv, capsys)
    assert tag(colours, models, "--repo_id=somebody/tagger") == 0  # without the hub
    assert captions_in(colours, ".txt")["red.txt"] == f"{expected_tags(COLOURS['red'])}\n"


def test_folders_that_hold_nothing_to_tag_are_refused(tmp_path, tagger, capsys):
    argv = [f"--model_dir={tagger}"]
    assert "there is no folder" in said_on_refusal(script, [str(tmp_path / "none"), *argv], capsys)
    assert "no images in" in said_on_refusal(script, [str(tmp_path), *argv], capsys)
    for suffix in (".png", ".jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"01{suffix}")
    assert "would share their .txt file" in said_on_refusal(script, [str(tmp_path), *argv], capsys)


def test_what_runs_out_is_told_with_a_remedy(colours, tagger, capsys, monkeypatch):
    import library.annotation.describing as describing
    from library.annotation.tagger import Tagger
    from library.config.atomic_files import CannotWrite

    def full(path: Path, text: str):
        raise CannotWrite(f"cannot write '{path}': No space left on device.", "Free some space.", is_temporary=True)

    with monkeypatch.context() as patch:
        patch.setattr(describing, "write_text", full)
        said = said_on_refusal(script, [str(colours), f"--model_dir={tagger}"], capsys)
    assert "No space left on device" in said and captions_in(colours, ".txt") == {}

    def out_of_memory(session, *arguments):
        raise MemoryError("bad allocation")

    monkeypatch.setattr(Tagger, "_run", out_of_memory)
    said = said_on_refusal(script, [str(colours), f"--model_dir={tagger}"], capsys)
    assert "out of memory with 4 images of 16 x 16 at once" in said and "Lower --batch_size" in said


def test_a_second_run_on_the_same_folder_is_refused(colours, tagger, capsys):
    with run_lock(colours, ".txt files", doing="writing"):
        said = said_on_refusal(script, [str(colours), f"--model_dir={tagger}"], capsys)
    assert re.search(r"process \d+ is writing .txt files in '.*'. Wait until it has ended", said)
    assert tag(colours, tagger) == 0
