"""Who is answered, and what nobody can reach or break."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from library.config.atomic_files import CannotWrite
from library.config.options import parse_options
from library.editing import caption_places
from studio.opened import Opened
from studio.options import OPTION_CLASSES, ServerOptions, subsets_of
from studio.safety import LARGEST_BODY, POLICY
from studio.serving import listening_socket
from tests.studio.served import TOKEN, studio, wait_for, write_set

REPOSITORY = Path(__file__).parents[2]
MARKUP = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>. A sentence."


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        patch.setenv(name, str(tmp_path_factory.mktemp("home") / name))
    folder = write_set(tmp_path_factory.mktemp("set") / "images", {"a": ("cat", "a cat"), "b": (None, None)})
    with studio(folder) as opened:
        opened.folder = folder
        yield opened
    patch.undo()


@pytest.fixture
def stranger(running):
    with httpx.Client(base_url=running.origin) as client:
        yield client


BEARER = {"authorization": f"Bearer {TOKEN}"}


def test_only_the_names_of_this_machine_are_answered(running, stranger):
    for host in ("evil.example", f"evil.example:{running.port}", "127.0.0.1", f"127.0.0.1.evil.example:{running.port}"):
        assert stranger.get("/api/set", headers={**BEARER, "host": host}).status_code == 421
    assert stranger.get("/api/set", headers={**BEARER, "host": f"localhost:{running.port}"}).status_code == 200


def test_nothing_is_told_without_the_token(running, stranger):
    paths = ["/", "/api/set", "/api/view", "/api/images/1", "/thumbnails/1", "/static/main.js", "/api/events"]
    assert {stranger.get(path).status_code for path in paths} == {403}
    assert stranger.get("/", params={"token": TOKEN[:-1] + "x"}).status_code == 403
    assert stranger.get("/api/set", headers={"authorization": "Bearer"}).status_code == 403
    assert stranger.get("/api/set", cookies={f"studio-{running.port}": TOKEN + "x"}).status_code == 403
    welcome = stranger.get("/", params={"token": TOKEN})
    assert (welcome.status_code, welcome.headers["location"]) == (303, "/")
    cookie = welcome.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert stranger.get("/api/set").status_code == 200  # the client has taken the cookie


def test_other_pages_can_ask_for_nothing(running, stranger):
    stranger.get("/", params={"token": TOKEN})
    tag = running.caption("a.png", "l")["tag"]
    path = f"/api/images/{running.number('a.png')}/captions/l"
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"http://127.0.0.1:{running.port + 1}"},
        {"origin": running.origin, "sec-fetch-site": "cross-site"},
        {"origin": running.origin, "sec-fetch-site": "same-site"},
        {},
    ):
        answer = stranger.put(path, json={"variant": 0, "text": "x"}, headers={"if-match": tag, **headers})
        assert answer.status_code == 403
        if headers:
            assert stranger.get("/api/set", headers=headers).status_code == 403
    assert (running.folder / "a.txt").read_bytes() == b"cat"


def test_nothing_is_written_by_get(running):
    for path in ("/api/undo", "/api/redo", "/api/edits/apply", "/api/images/1/captions/l", "/api/count"):
        assert running.client.get(path).status_code == 405


def test_every_answer_has_the_policy(running, stranger):
    for answer in (running.client.get("/"), running.client.get("/api/set"), stranger.get("/")):
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY
    assert "http" not in POLICY


def test_the_page_needs_nothing_from_elsewhere():
    for file in (REPOSITORY / "studio" / "static").iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]+|innerHTML|outerHTML|insertAdjacentHTML|eval\(", text), file
        assert len(text.splitlines()) <= 300, file


@pytest.mark.parametrize("number", ["0", "99", "-1", "a.png", "..%2f..%2fetc%2fpasswd", "1%00", "%2e%2e", "9" * 400])
def test_images_are_named_by_numbers_alone(running, number):
    for path in (f"/thumbnails/{number}", f"/pictures/{number}", f"/api/images/{number}"):
        assert running.client.get(path).status_code in (400, 404)
    assert running.put(7, "l", "absent", variant=0, text="x").status_code == 400


@pytest.mark.parametrize("path", ["/static/../safety.py", "/static/..%2fsafety.py", "/static//etc/passwd", "/static/"])
def test_files_are_those_of_the_page_alone(running, path):
    assert running.client.get(path).status_code == 404


def test_bodies_that_are_none_are_refused(running):
    path = f"/api/images/{running.number('a.png')}/captions/l"
    tag = running.caption("a.png", "l")["tag"]
    send = {"if-match": tag, "content-type": "application/json"}
    assert running.client.put(path, content=b"{", headers=send).status_code == 400
    assert running.client.put(path, content=b"[]", headers=send).status_code == 400
    assert running.client.put(path, content=b"[" * 100_000, headers=send).status_code == 400
    assert running.client.put(path, content=b"{}", headers={"if-match": tag}).status_code == 400
    assert running.client.put(path, json={"variant": 0, "text": "x"}).status_code == 400  # names no caption
    for body in (
        {"variant": 5, "text": "x"},
        {"variant": 0, "text": 3},
        {"variant": "x"},
        {"raw": "\0"},
    ):
        assert running.put(running.number("a.png"), "l", tag, **body).status_code == 400
    assert running.put(running.number("a.png"), "x", tag, variant=0, text="").status_code == 400
    half = running.client.put(path, content=b'{"variant": 0, "text": "\\udc00"}', headers=send)
    assert half.status_code == 400
    large = running.client.put(path, content=b" " * (LARGEST_BODY + 1), headers=send)
    assert large.status_code == 413
    assert (running.folder / "a.txt").read_bytes() == b"cat"


def test_two_writers_at_once_leave_one_winner_and_no_loss(running):
    number, tag = running.number("a.png"), running.caption("a.png", "g")["tag"]
    first = running.put(number, "g", tag, variant=0, text="mine")
    second = running.put(number, "g", tag, variant=0, text="theirs")
    assert (first.status_code, second.status_code) == (200, 412)
    assert second.json()["now"]["text"] == "mine"
    (running.folder / "a.caption").write_bytes(b"by another program")
    third = running.put(number, "g", first.json()["caption"]["tag"], variant=0, text="x")
    assert third.status_code == 412
    assert (running.folder / "a.caption").read_bytes() == b"by another program"


def test_a_full_disk_is_told_and_leaves_the_caption(running, monkeypatch):
    def full(path):
        raise CannotWrite(f"cannot write: {os.strerror(errno.ENOSPC)}.", "Free some space.", is_temporary=True)

    number, caption = running.number("a.png"), running.caption("a.png", "l")
    monkeypatch.setattr(caption_places, "replacing", full)
    refused = running.put(number, "l", caption["tag"], variant=0, text="new")
    assert refused.status_code == 507
    assert "No space left on device" in refused.json()["problem"]
    monkeypatch.undo()
    assert (running.folder / "a.txt").read_bytes() == b"cat"
    assert running.put(number, "l", caption["tag"], variant=0, text="cat").status_code == 200


def test_a_preview_that_is_out_of_date_changes_nothing(running):
    edit = {"kind": "add", "encoders": ["l"], "find": "new tag"}
    plan = running.post("/api/edits/preview", edit=edit, query="").json()
    assert plan["num"] == 2
    (running.folder / "a.txt").write_bytes(b"dog")
    assert running.post("/api/edits/apply", edit=edit, query="", plan=plan["plan"]).status_code == 412
    assert (running.folder / "a.txt").read_bytes() == b"dog"
    assert not (running.folder / "b.txt").exists()
    for wrong in (
        {"kind": "burn"},
        {"find": ""},
        {"encoders": []},
        {"kind": "replace", "reading": "pattern", "find": "("},
    ):
        assert running.post("/api/edits/preview", edit={**edit, **wrong}, query="").status_code == 400


def test_markup_in_captions_and_names_is_text(page, tmp_path):
    folder = write_set(tmp_path / "images", {"plain": (MARKUP, MARKUP)})
    name = "<img src=x onerror=alert(1)> &amp; 'quotes'.png"
    shutil.copy(folder / "plain.png", folder / name)
    with studio(folder) as running:
        page.goto(running.link)
        page.locator(".cell", has_text="plain.png").dblclick()
        expect(page.locator(".card.g textarea").first).to_have_value(MARKUP)
        page.get_by_role("button", name="Next image").or_(
            page.get_by_role("button", name="Previous image")
        ).last.click()
        page.keyboard.press("Escape")
        expect(page.locator("#editor")).to_be_hidden()
        page.click("#toggle-panel")
        expect(page.locator(".tags li").first).to_be_visible()
        assert page.locator(".cell .name").filter(has_text="onerror").text_content() == name
        assert page.title() == "images – Studio"
        assert page.locator("main script, main img[src=x]").count() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="names there are characters")
def test_an_image_whose_name_is_no_utf8_is_shown_and_written_like_others(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    folder = write_set(tmp_path / "images", {name: ("cat", "a cat"), "plain": ("dog", "a dog")})
    with studio(folder) as running:
        assert sorted(running.get("/api/view")["names"]) == sorted([f"{name}.png", "plain.png"])
        state = running.caption(f"{name}.png", "l")
        answer = running.put(running.number(f"{name}.png"), "l", state["tag"], variant=0, text="bird")
        assert (answer.status_code, (folder / f"{name}.txt").read_text(encoding="utf-8")) == (200, "bird")
        assert running.post("/api/undo").status_code == 200
        (folder / "plain.txt").write_text("horse", encoding="utf-8")  # the watcher is still there
        wait_for(lambda: running.caption("plain.png", "l")["variants"] == ["horse"])
    assert (folder / f"{name}.txt").read_text(encoding="utf-8") == "cat"


def test_a_folder_that_is_removed_while_open_is_missed_and_comes_back(tmp_path):
    folder = write_set(tmp_path / "images", {"a": ("cat", "a cat")})
    with studio(folder) as running:
        number, tag = running.number("a.png"), running.caption("a.png", "l")["tag"]
        folder.rename(tmp_path / "elsewhere")
        assert running.put(number, "l", "absent", variant=0, text="x").status_code in (400, 507)
        assert not folder.exists()
        wait_for(lambda: running.get("/api/view")["total"] == 0)
        assert running.client.get(f"/thumbnails/{number}").status_code == 404
        (tmp_path / "elsewhere").rename(folder)
        wait_for(lambda: running.get("/api/view")["total"] == 1)
        assert running.put(running.number("a.png"), "l", tag, variant=0, text="x").status_code == 200


def test_two_studios_of_one_set_share_their_undo(tmp_path):
    folder = write_set(tmp_path / "images", {"a": ("cat", "a cat")})
    with studio(folder) as one, studio(folder) as other:
        tag = one.caption("a.png", "l")["tag"]
        assert one.put(one.number("a.png"), "l", tag, variant=0, text="dog").status_code == 200
        assert other.put(other.number("a.png"), "l", tag, variant=0, text="cow").status_code == 412
        assert other.post("/api/undo").json()["num_written"] == 1
        assert one.post("/api/undo").status_code == 400
    assert (folder / "a.txt").read_bytes() == b"cat"


LOADED = """
import json, sys
from pathlib import Path
from studio.command import main, runs_of
from studio.options import OPTION_CLASSES, RunsOptions, subsets_of
from studio.opened import Opened
import studio.serving
early = {"numpy", "tokenizers", "tqdm", "PIL"} & sys.modules.keys()
from studio.run_app import routes_of_runs
routes_of_runs(runs_of(RunsOptions(run_dirs=[Path(".")]), []), has_set=False)
known = {"torch", "transformers", "diffusers", "accelerate", "tensorboard", "scipy", "open_clip"}
heavy = early | known & sys.modules.keys()
print(json.dumps([sorted(heavy), len(sys.modules)]))
"""


def test_the_body_of_an_answer_does_not_wait_until_its_headers_are_acknowledged():
    with listening_socket(ServerOptions(port=0)) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_way_to_the_first_page_is_light():
    ended = subprocess.run([sys.executable, "-c", LOADED], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    heavy, num_modules = json.loads(ended.stdout)
    assert heavy == []
    assert num_modules < 900


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no folder is named"),
        (["no such folder"], "there is no folder 'no such folder'"),
        (["."], "no images in '.'"),
        ([".", "--listen=0.0.0.0"], "needs --allowed_hosts"),
        ([".", "--token=short"], "--token needs 16 characters"),
        ([".", "--dataset_config=x.toml"], "--dataset_config names all folders"),
        ([".", "..", "--in_json=meta.json"], "--in_json needs one folder"),
        (["--run_dirs", "no such folder"], "--run_dirs: there is no folder 'no such folder'"),
        ([".", "--model_dirs", "."], "--model_dirs has no effect without --run_dirs"),
    ],
)
def test_a_command_that_cannot_work_is_refused_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    from studio.command import main

    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_a_link_that_works_and_ends_on_a_signal(tmp_path):
    folder = write_set(tmp_path / "my images", {"a": ("cat", "a cat")})
    command = [sys.executable, str(REPOSITORY / "studio.py"), str(folder), "--port=0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        link = process.stdout.readline().split()[-1]
        with httpx.Client(follow_redirects=True) as client:
            assert "<title>Studio</title>" in client.get(link).text
        process.terminate()
        assert process.wait(20) in (0, -15, 143)
    port = int(re.search(r":(\d+)/", link)[1])
    assert port > 0


def opened_with(folder, num_images):
    """Return a set of empty images as the server has it, of which nothing is read yet."""
    for number in range(num_images):
        (folder / f"{number:04}.png").touch()
    options, _, _, captions, buckets, _ = parse_options(OPTION_CLASSES, [str(folder)], description="")
    return Opened(subsets_of(options, captions, buckets), 0)


def test_pages_that_ask_again_and_again_do_not_stop_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("studio.opened._LONGEST_REST", 0.1)
    opened = opened_with(tmp_path, 1200)
    with opened.urgent():
        opened._read()
    opened.close()
    assert opened.captions.is_loaded and opened._rest_left == 0


def test_the_reading_of_captions_rests_while_a_page_waits(tmp_path, monkeypatch):
    monkeypatch.setattr("studio.opened._LONGEST_REST", 60.0)
    opened = opened_with(tmp_path, 600)
    with opened.urgent():
        reading = threading.Thread(target=opened._read)
        reading.start()
        wait_for(lambda: opened.progress[0] > 0)
        first = opened.progress
        time.sleep(0.2)
        assert opened.progress == first
    reading.join(60)
    opened.close()
    assert opened.captions.is_loaded
