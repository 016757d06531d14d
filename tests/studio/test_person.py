"""A person's work in a real browser, by keyboard where it can be."""

import re

import pytest
from playwright.sync_api import expect

from tests.studio.served import studio, wait_for, write_set

LONG = ", ".join(f"tag number {number}" for number in range(40))


@pytest.fixture
def folder(tmp_path):
    return write_set(
        tmp_path / "my set" / "images",
        {
            "01": ("1girl, cat, red hair", "A cat sits beside a girl."),
            "02": (None, None),
            "03": ("dog\r\nsecond line\r\n", None),
            "04": (LONG, "A <b>bold</b> claim & more."),
        },
    )


def open_image(page, name):
    page.locator(".cell", has_text=f"{name}.png").dblclick()
    expect(page.locator(".editor-bar h2")).to_have_text(f"{name}.png")
    expect(page.locator(".card.l .meter strong")).to_be_visible()


def begin_edit(page, tag, text):
    page.locator(".card.l .chip", has_text=tag).click()
    page.get_by_label(f"Edit {tag}").fill(text)


def saved(page):
    for encoder in "lg":
        expect(page.locator(f".card.{encoder} .saved")).to_have_text("saved")


def test_both_captions_of_three_images_are_written_by_keyboard_and_undone_after_a_restart(page, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with studio(folder) as running:
        page.goto(running.link)
        expect(page.locator("#count")).to_have_text("4 images")
        page.focus("#grid")
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        page.locator("#editor .card.l input[role=combobox]").wait_for()
        for number in range(3):
            expect(page.locator(".editor-bar h2")).to_have_text(f"0{number + 1}.png")
            page.keyboard.press("Alt+l")
            page.keyboard.type(f"tag {number}")
            page.keyboard.press("Enter")
            page.keyboard.press("Alt+g")
            page.keyboard.press("Control+End")
            page.keyboard.type(f" Sentence {number}.")
            page.keyboard.press("PageDown")
        page.keyboard.press("Escape")
        expect(page.locator("#editor")).to_be_hidden()
        assert (folder / "01.txt").read_bytes() == b"1girl, cat, red hair, tag 0"
        assert (folder / "01.caption").read_bytes() == b"A cat sits beside a girl. Sentence 0."
        assert (folder / "02.txt").read_bytes() == b"tag 1\n"
        assert (folder / "02.caption").read_bytes() == b"Sentence 1.\n"
        assert (folder / "03.txt").read_bytes() == b"dog, tag 2\r\nsecond line\r\n"
    with studio(folder) as running:
        page.goto(running.link)
        for _ in range(6):
            expect(page.locator("#undo")).to_be_enabled()
            shown = page.locator(".toast").count()
            page.locator("#grid").press("Control+z")
            expect(page.locator(".toast")).to_have_count(shown + 1)
        expect(page.locator("#undo")).to_be_disabled()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_tag_is_replaced_in_the_whole_set_and_back(page, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with studio(folder) as running:
        page.goto(running.link)
        page.click("#toggle-panel")
        page.get_by_role("button", name="1girl", exact=True).click()
        page.get_by_label("by", exact=True).fill("woman")
        page.get_by_role("button", name="Show the changes").click()
        expect(page.locator("#preview del")).to_have_text("1girl")
        expect(page.locator("#preview ins")).to_have_text("woman")
        page.get_by_role("button", name="Change 1 caption").click()
        expect(page.locator(".toast")).to_contain_text("replace '1girl' by 'woman' in L")
        assert (folder / "01.txt").read_bytes() == b"woman, cat, red hair"
        expect(page.get_by_role("button", name="woman", exact=True)).to_be_visible()
        page.click("#undo")
        expect(page.locator(".toast", has_text="Undone")).to_be_visible()
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_over_the_limit_is_seen_and_found(page, folder):
    with studio(folder) as running:
        page.goto(running.link)
        page.get_by_role("button", name="over the limit").click()
        expect(page.locator("#count")).to_have_text("1 of 4 images")
        expect(page.locator(".row:not([hidden]) .count.l.over")).to_have_text(re.compile(r"L 1\d\d"))
        open_image(page, "04")
        expect(page.locator(".card.l .meter")).to_have_class("meter over")
        expect(page.locator(".card.l .meter p")).to_contain_text("not read:")
        last = page.locator(".card.l .chips li").last
        expect(last).to_have_class("is-cut")
        page.keyboard.press("Alt+t")
        expect(page.locator(".card.l .marks .cut").last).to_contain_text("39")
        # ftfy: what the encoder reads is told where it is not what was written
        expect(page.locator(".card.g textarea").first).to_have_value("A <b>bold</b> claim & more.")
        page.locator(".card.g textarea").first.fill("caf&eacute; and girl")
        expect(page.locator(".card.g .note")).to_have_text("Cleaned before it is read: café and girl")
        page.locator(".card.l textarea").first.fill("1girl, girl")
        expect(page.locator(".shared-words")).to_have_text("In both captions: girl")
        expect(page.locator(".card.l .marks .shared")).to_have_text("girl")
        saved(page)


def test_tags_are_moved_edited_and_removed_by_keys_and_offered(page, folder):
    with studio(folder) as running:
        page.goto(running.link)
        open_image(page, "01")
        page.keyboard.press("ArrowLeft")  # from the empty field to the last tag
        expect(page.locator(".card.l .chip:focus")).to_have_text("red hair")
        page.keyboard.press("Alt+ArrowLeft")
        page.keyboard.press("Alt+ArrowLeft")
        expect(page.locator(".card.l .chip:focus")).to_have_text("red hair")
        saved(page)
        assert (folder / "01.txt").read_bytes() == b"red hair, 1girl, cat"
        page.keyboard.press("Enter")
        page.keyboard.type("blue hair")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Delete")
        saved(page)
        assert (folder / "01.txt").read_bytes() == b"blue hair, cat"
        page.keyboard.press("Alt+l")
        page.keyboard.type("tag number 3")
        expect(page.locator(".card.l [role=option]").first).to_contain_text("tag number 3")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.locator(".card.l .chips li", has_text="cat").drag_to(page.locator(".card.l .chips li", has_text="blue"))
        expect(page.locator(".card.l .chips .chip")).to_have_text(["cat", "blue hair", "tag number 3"])
        saved(page)
        assert (folder / "01.txt").read_bytes() == b"cat, blue hair, tag number 3"


def test_a_tag_that_is_dropped_outside_of_the_tags_stays_where_it_was(page, folder):
    with studio(folder) as running:
        page.goto(running.link)
        open_image(page, "01")
        chips = page.locator(".card.l .chips .chip")
        chips.nth(2).hover()
        page.mouse.down()
        for _ in range(2):  # the first movement begins a drag
            chips.nth(0).hover()
        expect(page.locator(".card.l .chips .is-target")).to_have_count(1)
        page.locator(".editor-bar h2").hover()
        page.mouse.up()
        expect(page.locator(".card.l .chips .is-target")).to_have_count(0)
        expect(chips).to_have_text(["1girl", "cat", "red hair"])
        assert (folder / "01.txt").read_bytes() == b"1girl, cat, red hair"


def test_a_tag_that_is_being_edited_stays_with_its_image_when_the_next_one_is_opened(page, folder):
    with studio(folder) as running:
        page.goto(running.link)
        open_image(page, "03")
        begin_edit(page, "dog", "big dog")
        page.keyboard.press("PageDown")
        expect(page.locator(".editor-bar h2")).to_have_text("04.png")
        expect(page.locator(".card.l .chip")).to_have_text(LONG.split(", "))
        saved(page)
        assert (folder / "03.txt").read_bytes() == b"big dog\r\nsecond line\r\n"
        assert (folder / "04.txt").read_bytes() == LONG.encode()


def test_a_tag_that_is_being_edited_while_the_caption_changes_on_the_disk_is_a_conflict(page, folder):
    with studio(folder) as running:
        page.goto(running.link)
        open_image(page, "01")
        begin_edit(page, "cat", "black cat")
        (folder / "01.txt").write_bytes(b"dog, 1girl, cat")
        expect(page.locator(".card.l .conflict")).to_be_visible()
        page.get_by_label("Edit cat").press("Enter")
        assert (folder / "01.txt").read_bytes() == b"dog, 1girl, cat"
        page.get_by_role("button", name="Keep mine").click()
        saved(page)
        assert (folder / "01.txt").read_bytes() == b"1girl, black cat, red hair"


def test_variants_are_tabs_and_a_caption_is_copied_from_the_previous_image(page, folder):
    with studio(folder, "--enable_wildcard") as running:
        page.goto(running.link)
        open_image(page, "03")
        page.get_by_role("tab", name="Variant 2").click()
        expect(page.locator(".card.l .chips li")).to_contain_text(["second line"])
        page.locator(".card.l").get_by_role("button", name="Add a variant").click()
        expect(page.locator(".card.l").get_by_role("tab")).to_have_count(3)
        page.locator(".card.l").get_by_role("button", name="Raw").click()
        expect(page.locator(".card.l .raw")).to_have_value("dog\nsecond line\nsecond line\n")
        page.locator(".card.l .raw").fill("dog\nanother\nsecond line\n")
        saved(page)
        assert (folder / "03.txt").read_bytes() == b"dog\r\nanother\r\nsecond line\r\n"
        page.keyboard.press("PageUp")
        page.keyboard.press("PageUp")
        expect(page.locator(".editor-bar h2")).to_have_text("01.png")
        page.keyboard.press("PageDown")
        expect(page.locator(".editor-bar h2")).to_have_text("02.png")
        page.keyboard.press("Alt+g")
        page.keyboard.press("Alt+c")
        saved(page)
        wait_for(lambda: (folder / "02.caption").is_file())
        assert (folder / "02.caption").read_bytes() == b"A cat sits beside a girl.\n"


def test_a_conflict_of_two_tabs_is_told_and_nothing_is_overwritten(page, browser, folder):
    with studio(folder) as running:
        page.goto(running.link)
        open_image(page, "01")
        page.keyboard.press("Alt+g")
        page.keyboard.press("Control+End")
        with browser.new_context() as other:
            second = other.new_page()
            second.goto(running.link)
            open_image(second, "01")
            second.keyboard.press("Alt+g")
            second.keyboard.press("Control+End")
            page.keyboard.type(" Mine.")
            second.keyboard.type(" Theirs.")
            expect(page.locator(".card.g .conflict, .card.g .saved[data-state=saved]").first).to_be_visible()
            wait_for(lambda: page.locator(".conflict:visible").count() + second.locator(".conflict:visible").count())
        told = page.locator(".card.g .conflict")
        on_disk = (folder / "01.caption").read_bytes()
        assert on_disk in (b"A cat sits beside a girl. Mine.", b"A cat sits beside a girl. Theirs.")
        if told.is_visible():
            expect(told).to_contain_text("Theirs.")
            page.get_by_role("button", name="Keep mine").click()
            saved(page)
            assert (folder / "01.caption").read_bytes() == b"A cat sits beside a girl. Mine."
            assert running.post("/api/undo").status_code == 200
            assert (folder / "01.caption").read_bytes() == b"A cat sits beside a girl. Theirs."


def test_a_change_by_another_program_is_shown_within_a_second_or_told(page, folder):
    with studio(folder) as running:
        page.goto(running.link)
        open_image(page, "01")
        page.keyboard.press("Alt+g")
        (folder / "01.caption").write_text("written by another program", encoding="utf-8")
        expect(page.locator(".card.g textarea").first).to_have_value("written by another program")
        expect(page.locator(".card.g .conflict")).to_be_hidden()


def test_ten_draws_are_shown(page, folder, tmp_path):
    config = tmp_path / "set.toml"
    written = folder.relative_to(tmp_path).as_posix()  # what is drawn depends on the folder as it is written
    config.write_text(
        f"""
        [general]
        shuffle_caption_l = true
        caption_dropout_rate_g = 0.3
        caption_prefix_g = "photo of"
        [[datasets]]
        resolution = 1024
          [[datasets.subsets]]
          image_dir = '{written}'
        """,
        encoding="utf-8",
    )
    for name in ("02", "03"):
        for ending in (".txt", ".caption"):
            if not (folder / f"{name}{ending}").exists():
                (folder / f"{name}{ending}").write_text("x", encoding="utf-8")
    with studio("--dataset_config", config, "--seed=6") as running:
        page.goto(running.link)
        open_image(page, "04")
        page.keyboard.press("Alt+w")
        expect(page.locator(".draws tbody tr")).to_have_count(10)
        drawn = running.get(f"/api/images/{running.number('04.png')}/draws")["draws"]
    assert {draw["g"]["is_dropped"] for draw in drawn} == {True, False}
    assert len({draw["l"]["reading"]["kept"] for draw in drawn}) == 10
    assert all(draw["l"]["reading"]["cut"] for draw in drawn)


def test_axe_finds_nothing(page, folder):
    axe_playwright_python = pytest.importorskip("axe_playwright_python.sync_playwright")
    axe = axe_playwright_python.Axe()

    def violations():
        found = axe.run(page).response["violations"]
        return [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]

    with studio(folder) as running:
        page.emulate_media(color_scheme="dark")
        page.goto(running.link)
        expect(page.locator(".cell img[src]").first).to_be_visible()
        page.click("#toggle-panel")
        expect(page.locator(".tags li").first).to_be_visible()
        assert violations() == []
        page.click("#show-help")
        expect(page.locator("#help")).to_be_visible()
        assert violations() == []
        page.keyboard.press("Escape")
        page.click("#theme")
        page.get_by_role("button", name="1girl", exact=True).click()
        page.get_by_label("by", exact=True).fill("woman")
        page.get_by_role("button", name="Show the changes").click()
        expect(page.locator("#preview ins")).to_be_visible()
        assert violations() == []
        page.keyboard.press("Escape")
        open_image(page, "04")
        page.keyboard.press("Alt+w")
        expect(page.locator(".draws tbody tr")).to_have_count(10)
        assert violations() == []
