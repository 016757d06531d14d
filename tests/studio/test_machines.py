"""Captions by machine, from the page: proposed, looked at, taken as one step, undone."""

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.annotation.tiny_captioners import write_blip
from tests.studio.served import studio, wait_for, write_set

tiny_tagger = pytest.importorskip("tests.annotation.tiny_tagger", reason="onnx is not installed", exc_type=ImportError)


@pytest.fixture
def folder(tmp_path):
    folder = write_set(tmp_path / "images", {"blue": ("old, tags\nsecond\n", None), "red": (None, None)})
    for name, colour in (("blue", (10, 10, 240)), ("red", (250, 20, 20))):
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
    return folder


def test_tags_are_proposed_taken_and_undone(page, folder, tmp_path):
    tagger = tiny_tagger.write_tagger(tmp_path / "tagger")
    with studio(folder, f"--tagger_model={tagger}") as running:
        page.goto(running.link)
        page.click("#toggle-panel")
        page.get_by_role("button", name="Tags for L", exact=True).click()
        expect(page.locator("#preview")).to_be_visible(timeout=60_000)
        expect(page.locator("#preview li")).to_have_count(2)
        assert (folder / "blue.txt").read_bytes() == b"old, tags\nsecond\n"
        page.get_by_role("button", name="Change 2 captions").click()
        expect(page.locator(".toast")).to_contain_text("tags by machine for L")
        assert (folder / "red.txt").read_bytes() == b"red_light, ^_^, red_riding_hood_(wolf)_(tales)\n"
        assert (folder / "blue.txt").read_bytes().endswith(b"\nsecond\n")
        assert b"blue_light" in (folder / "blue.txt").read_bytes()
        assert running.post("/api/undo").json()["num_written"] == 2
        assert (folder / "blue.txt").read_bytes() == b"old, tags\nsecond\n"
        assert sorted(path.name for path in folder.iterdir()) == ["blue.png", "blue.txt", "red.png"]


@pytest.mark.slow  # a process that imports transformers
def test_sentences_are_proposed_for_g(page, folder, tmp_path):
    model = write_blip(tmp_path / "captioner")
    with studio(folder, f"--captioner_model={model}") as running:
        page.goto(running.link)
        page.click("#toggle-panel")
        page.get_by_role("button", name="Sentences for G", exact=True).click()
        expect(page.locator("#preview")).to_be_visible(timeout=120_000)
        expect(page.locator("#preview li")).to_have_count(2)
        page.get_by_role("button", name="Change 2 captions").click()
        expect(page.locator(".toast")).to_contain_text("sentences by machine for G")
        assert (folder / "red.caption").read_bytes()
        assert (folder / "blue.txt").read_bytes() == b"old, tags\nsecond\n"
        assert running.post("/api/undo").json()["num_written"] == 2
        assert not (folder / "red.caption").exists()


def test_a_machine_that_fails_is_told_and_one_can_be_stopped(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with studio(folder, f"--tagger_model={tmp_path / 'empty'}") as running:
        said = []
        machines = running.opened.machines
        machines._tell = lambda **facts: said.append(facts)
        assert running.post("/api/machine", machine="sentences", query="").status_code == 400
        assert running.post("/api/machine", machine="tags", query="l:nothing").status_code == 400
        assert running.post("/api/machine", machine="tags", query="").status_code == 200
        assert running.post("/api/machine", machine="tags", query="").status_code == 400
        wait_for(lambda: said and said[-1]["is_over"], 60)
        assert said[-1]["problem"].startswith("error:")
        assert running.post("/api/machine", machine="tags", query="").status_code == 200
        assert running.post("/api/machine/cancel").status_code == 200
        wait_for(lambda: said[-1]["problem"] == "cancelled", 60)
        assert running.post("/api/edits/preview", machine="tags").json()["num"] == 0
