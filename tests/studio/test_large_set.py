"""A set of a hundred thousand images: opened, asked about, edited as one step and undone."""

import os
import shutil

import pytest
from playwright.sync_api import expect

from tests.studio.served import studio, wait_for, write_set

pytestmark = pytest.mark.slow

NUM_IMAGES = 100_000
FEW = 2000
MOST_LINKS = 10_000


def test_a_hundred_thousand_images_are_opened_asked_about_edited_and_undone(page, tmp_path):
    folder = write_set(tmp_path / "images", {"00000": ("tag, number 0", None)})
    for number in range(1, NUM_IMAGES):
        if number % MOST_LINKS == 0:  # of one file
            shutil.copy(folder / "00000.png", folder / f"{number:05}.png")
        else:
            os.link(folder / f"{number // MOST_LINKS * MOST_LINKS:05}.png", folder / f"{number:05}.png")
        if number < FEW:
            (folder / f"{number:05}.txt").write_text(f"tag, number {number}", encoding="utf-8")
    with studio(folder, wait=False) as running:
        page.goto(running.link)
        wait_for(lambda: running.get("/api/view")["total"] == NUM_IMAGES, 60)
        expect(page.locator("#count")).to_contain_text("100,000 images", timeout=60_000)
        assert page.evaluate("document.querySelectorAll('*').length") < 1000
        page.evaluate("document.getElementById('grid').scrollTop = 1e9")
        expect(page.locator(".cell .name", has_text="99999.png")).to_be_visible()
        wait_for(lambda: running.opened.captions.is_loaded, 300)
        assert len(running.get("/api/view", query="no:l")["ids"]) == NUM_IMAGES - FEW
        edit = {"kind": "replace", "encoders": ["l"], "find": "tag", "by": "word"}
        plan = running.post("/api/edits/preview", edit=edit, query="l:tag").json()
        assert plan["num"] == FEW
        done = running.post("/api/edits/apply", edit=edit, query="l:tag", plan=plan["plan"]).json()
        assert (done["num_written"], done["conflicts"], done["failed"]) == (FEW, [], [])
        assert (folder / "01999.txt").read_bytes() == b"word, number 1999"
        assert running.post("/api/undo").json()["num_written"] == FEW
        assert (folder / "01999.txt").read_bytes() == b"tag, number 1999"
