"""Runs from the page: found, watched, looked at, asked; and what nobody can reach or break through their routes."""

import json
import os
import shutil
import signal
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect

from library.config.errors import UserError
from library.images.thumbnails import thumbnail_name
from library.samples.picture_files import SAMPLE_FOLDER
from library.training.run_record import RECORD_FOLDER, End
from studio.confinement import problems_of_paths, require_confined_data_set
from studio.run_routes import EDGE_OF_SAMPLES
from studio.runs import Runs
from studio.workers import Worker
from tests.studio.served import TOKEN, studio, wait_for, write_set
from tests.studio.written_runs import BEGAN, scalar, write_grid, write_run, write_samples

MARKUP = "<img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        patch.setenv(name, str(tmp_path_factory.mktemp("home") / name))
    root = tmp_path_factory.mktemp("my runs")
    write_run(root / "output", "first", num_steps=60, sample_steps=[0, 20, 40, 60])
    write_run(root / "output", "second", began=BEGAN + timedelta(hours=1), has_end=False, sample_steps=[0, 40])
    with studio("--run_dirs", root) as opened:
        opened.root = root
        yield opened
    patch.undo()


def of_name(running, name):
    return next(run for run in running.get("/api/runs")["runs"] if run["name"] == name)


def test_runs_are_listed_with_how_far_they_are(running):
    found = running.get("/api/runs")
    assert [(run["name"], run["state"], run["step"]) for run in found["runs"]] == [
        ("second", "runs", 100),
        ("first", "finished", 60),
    ]
    assert (found["problems"], found["has_set"]) == ([], False)
    assert running.client.get("/").headers["location"] == "/runs"


def test_a_run_is_shown_with_its_curves_marks_and_samples(running):
    run = running.get(f"/api/runs/{of_name(running, 'first')['id']}")
    assert [chart["title"] for chart in run["charts"]][:2] == ["Loss", "Loss on images that are not trained"]
    assert run["errors"] == ["worth/l/standard_error"]
    assert (run["marks"]["spike"], run["marks"]["samples"]) == ([30], [0, 20, 40, 60])
    assert (run["can_resume"], run["has_log"], run["num_samples"]) == (False, False, 8)
    asked = f"/api/runs/{run['id']}/curves"
    curve = running.get(asked, name="loss/current", points=20)["curves"]["loss/current"]
    assert len(curve["steps"]) == len(curve["values"]) <= 25
    assert running.get(asked, name="loss/current", first=10, last=12)["curves"]["loss/current"]["steps"] == [
        9,
        10,
        11,
        12,
        13,
    ]
    assert running.get(asked, name="no such curve")["curves"] == {}
    samples = running.get(f"/api/runs/{run['id']}/samples")
    assert samples["steps"] == [0, 20, 40, 60] and list(samples["grids"]) == ["0", "60"]
    assert [row["l"] for row in samples["rows"]] == ["close-up, soft light", "still life"]
    picture = samples["rows"][1]["images"]["40"]
    about = running.get(f"/api/runs/{run['id']}/samples/{picture}")
    assert about["line"].startswith("a red cup --e still life --n") and about["texts"]["training_step"] == "40"
    path = f"/runs/{run['id']}/samples/{picture}"
    assert running.client.get(path).content == (running.root / "output" / SAMPLE_FOLDER / about["name"]).read_bytes()
    small = running.client.get(path, params={"edge": 320, "v": 1})
    assert small.headers["content-type"] == "image/jpeg" and "immutable" in small.headers["cache-control"]


def test_a_run_is_asked_to_save_and_to_stop_and_reported(running):
    run = of_name(running, "second")
    for what, file in (("save", "save-second"), ("stop", "stop-second")):
        assert running.post(f"/api/runs/{run['id']}/{what}").status_code == 200
        assert (running.root / "output" / file).is_file()
        (running.root / "output" / file).unlink()
    ended = of_name(running, "first")
    for what in ("save", "stop", "resume"):
        assert running.post(f"/api/runs/{ended['id']}/{what}").status_code == 400
    assert running.client.get(f"/runs/{ended['id']}/report").status_code == 404
    assert running.post(f"/api/runs/{ended['id']}/report").status_code == 200
    report = running.client.get(f"/runs/{ended['id']}/report")
    assert report.headers["content-disposition"].startswith("attachment") and "<h1>first</h1>" in report.text


# -- who is answered --------------------------------------------------------------------------------------------------


def test_nothing_is_told_or_done_for_strangers(running):
    run = of_name(running, "second")["id"]
    paths = [
        "/runs",
        "/api/runs",
        f"/api/runs/{run}",
        f"/api/runs/{run}/samples",
        f"/runs/{run}/report",
        "/static/runs.js",
    ]
    with httpx.Client(base_url=running.origin) as stranger:
        assert {stranger.get(path).status_code for path in paths} == {403}
        welcome = stranger.get("/runs", params={"token": TOKEN})
        assert (welcome.status_code, welcome.headers["location"]) == (303, "/runs")
        for headers in (
            {"origin": "http://evil.example"},
            {},
            {"origin": running.origin, "sec-fetch-site": "cross-site"},
        ):
            assert stranger.post(f"/api/runs/{run}/stop", json={}, headers=headers).status_code == 403
    for what in ("stop", "save", "resume"):
        assert running.client.get(f"/api/runs/{run}/{what}").status_code in (404, 405)
    assert not list((running.root / "output").glob("stop*"))


@pytest.mark.parametrize("name", ["0", "%2e%2e", "..%2f..%2fetc", "%00", "a" * 500])
def test_runs_and_images_are_named_by_their_ids_alone(running, name):
    run = of_name(running, "first")["id"]
    for path in (
        f"/api/runs/{name}",
        f"/runs/{run}/samples/{name}",
        f"/api/runs/{run}/samples/{name}",
        f"/runs/{name}/report",
    ):
        assert running.client.get(path).status_code in (400, 404)
    assert running.post(f"/api/runs/{name}/stop").status_code in (400, 404, 405)


def test_a_record_leads_nowhere_outside(tmp_path):
    secret = tmp_path / "secret"
    write_run(secret / "output", "hidden", sample_steps=[0])
    record = write_run(tmp_path / "runs" / "output", "m", sample_steps=[0], end=End(BEGAN.isoformat(), 3, "stopped"))
    file = tmp_path / "runs" / "output" / RECORD_FOLDER / f"{record.name}.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["log_folder"] = str(next((secret / "output" / "logs").iterdir()))
    content["options"]["pretrained_model_name_or_path"] = str(secret / "model.safetensors")
    file.write_text(json.dumps(content), encoding="utf-8")
    [sample] = (tmp_path / "runs" / "output" / SAMPLE_FOLDER).glob("*_000000_00.png")
    [hidden] = (secret / "output" / SAMPLE_FOLDER).glob("*_000000_00.png")
    sample.unlink()
    sample.symlink_to(hidden)
    (tmp_path / "runs" / "linked").symlink_to(secret)
    with studio("--run_dirs", tmp_path / "runs") as running:
        [run] = running.get("/api/runs")["runs"]
        shown = running.get(f"/api/runs/{run['id']}")
        assert shown["charts"] == [] and "outside of the opened folders" in shown["notes"][0]
        rows = running.get(f"/api/runs/{run['id']}/samples")["rows"]
        found = [picture for row in rows for picture in row["images"].values()]
        statuses = [running.client.get(f"/runs/{run['id']}/samples/{picture}").status_code for picture in found]
        assert sorted(statuses) in ([200], [200, 404])
        page = running.post(f"/api/runs/{run['id']}/report").json()
        assert "loss/current" not in (Path(page["folder"]) / page["name"]).read_text(encoding="utf-8")
        before = sorted(tmp_path.rglob("*"))
        file.write_text(json.dumps({**content, "output_name": "../../../secret/m", "end": None}), encoding="utf-8")
        [run] = running.get("/api/runs")["runs"]
        for what in ("stop", "save", "resume", "report"):
            answer = running.post(f"/api/runs/{run['id']}/{what}")
            assert answer.status_code == 400 and "separates folders" in answer.json()["problem"]
        assert sorted(tmp_path.rglob("*")) == before


def test_images_of_runs_are_made_in_the_order_in_which_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("studio.pictures.os.cpu_count", lambda: 1)
    write_samples(tmp_path, "m", range(3))
    paths = sorted((tmp_path / SAMPLE_FOLDER).glob("*.png"))
    pictures, made = Runs([tmp_path]).pictures, []
    with pictures._has_work:  # nothing is begun before all is asked for
        futures = [pictures.request(path, 160) for path in paths]
        for path, future in zip(paths, futures, strict=True):
            future.add_done_callback(lambda _, path=path: made.append(path))
    assert all(future.result(60) for future in futures)
    wait_for(lambda: made == paths)
    pictures.close()


def test_thumbnails_of_a_run_are_made_ahead_once_it_is_opened(tmp_path):
    write_run(tmp_path / "output", sample_steps=[0, 10, 20])
    samples = [path for path in (tmp_path / "output" / SAMPLE_FOLDER).glob("*.png") if "grid" not in path.name]
    assert len(samples) == 6
    with studio("--run_dirs", tmp_path) as running:
        folder = running.runs.pictures._folder
        files = [folder / thumbnail_name(path, EDGE_OF_SAMPLES) for path in samples]
        running.get(f"/api/runs/{of_name(running, 'm')['id']}")
        wait_for(lambda: all(file.is_file() for file in files))


def test_what_is_asked_for_is_made_before_what_is_made_ahead(tmp_path, monkeypatch):
    write_samples(tmp_path, "m", range(3))
    first, *paths = sorted((tmp_path / SAMPLE_FOLDER).glob("*.png"))
    made: list[Path] = []
    monkeypatch.setattr("studio.pictures.thumbnail", lambda image, *_: made.append(image) or b"")
    pictures = Runs([tmp_path]).pictures
    with pictures._has_work:  # nothing is begun before all is asked for
        pictures.make_ahead([*paths, first], 320)
        pictures.make_ahead(paths, 320)  # known: not a second time
        future = pictures.request(first, 320)
    assert future.result(60) == b""
    wait_for(lambda: len(made) == len(paths) + 2)
    assert made == [first, *paths, first]
    pictures.close()


def test_old_thumbnails_are_removed_where_runs_alone_are_open(tmp_path, monkeypatch):
    tidied = []
    monkeypatch.setattr("studio.pictures.remove_old_thumbnails", tidied.append)
    with studio("--run_dirs", tmp_path) as running:
        wait_for(lambda: tidied == [running.runs.pictures._folder])


def test_a_process_that_ended_while_it_waited_is_started_again():
    worker = Worker()
    try:
        pid = worker.run(os.getpid, seconds=60)
        pool = worker._pool
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: pool._broken)
        with pytest.raises(UserError, match="has ended"):
            worker.run(os.getpid, seconds=60)
        assert worker.run(os.getpid, seconds=60) != pid
    finally:
        worker.close()


def test_what_nobody_foresaw_is_told_at_its_place_with_the_traceback_in_the_log(running, monkeypatch, caplog):
    worker = Worker()
    try:
        with pytest.raises(UserError, match=r"nobody foresaw: KeyError: 3 .*report it"):
            worker.run({}.__getitem__, 3, seconds=60)
    finally:
        worker.close()
    assert "Traceback" in caplog.text
    caplog.clear()

    def fails(*_: object) -> None:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(running.runs.folders, "runs", fails)
    answer = running.client.get("/api/runs")
    assert answer.status_code == 500
    assert answer.json()["problem"].endswith("nobody foresaw: ZeroDivisionError: of the test")
    assert "report it" in answer.json()["remedy"] and "Traceback" in caplog.text


def test_paths_of_options_stay_within_the_folders(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "away").symlink_to("/")
    monkeypatch.chdir(tmp_path)
    places = Runs([Path("runs")], [Path("models")])
    places.close()
    right = {
        "output_dir": "runs/new",
        "pretrained_model_name_or_path": "models/a.safetensors",
        "logging_dir": str(tmp_path / "runs" / "logs"),
        "vae": "stabilityai/sdxl-vae",
        "resume": "latest",
        "output_name": "--x; rm -rf ~ && $(reboot)",
        "metadata_thumbnail": "data:image/png;base64,xx",
    }
    assert list(problems_of_paths(right, places)) == []
    wrong = {
        "output_dir": "models/out",
        "logging_dir": "runs/../..",
        "pretrained_model_name_or_path": "/etc/passwd",
        "sample_prompts": "runs/../../prompts.txt",
        "resume": "../state",
        "train_data_dir": "away/etc",
        "log_tracker_name": "../../x",
        "log_prefix": "..\\x",
        "dataset_class": "os.system",
        "huggingface_token": "hf_x",
        "console_log_file": "a" * 5000,
    }
    assert {name for name, _ in problems_of_paths(wrong, places)} == set(wrong)
    with pytest.raises(Exception, match="image_dir is '/etc'"):
        require_confined_data_set({"datasets": [{"subsets": [{"image_dir": "/etc"}]}]}, places)


@pytest.mark.parametrize("folder", ["/etc", "away/etc", "../models", "../../..", "runs/../../.."])
def test_folders_within_a_data_set_file_stay_within_the_folders(tmp_path, monkeypatch, folder):
    for name in ("runs/set", "models"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "away").symlink_to("/")
    monkeypatch.chdir(tmp_path)
    places = Runs([Path("runs")])
    places.close()
    file = Path("runs/set.toml")
    text = "[general]\nshuffle_caption = true\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{}'\n"
    file.write_text(text.format("runs/set"), encoding="utf-8")
    assert list(problems_of_paths({"dataset_config": str(file)}, places)) == []
    file.write_text(text.format(folder), encoding="utf-8")
    [(name, problem)] = problems_of_paths({"dataset_config": str(file)}, places)
    assert name == "dataset_config" and "outside of the opened folders" in problem


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_folder_that_disappears_and_images_without_text_are_told(tmp_path):
    output = tmp_path / "output"
    write_run(output, "m", sample_steps=[0, 10])
    names = sorted(path.name for path in (output / SAMPLE_FOLDER).glob("*_000010_0*.png"))
    Image.new("RGB", (8, 8)).save(output / SAMPLE_FOLDER / names[0])  # no text
    (output / SAMPLE_FOLDER / names[1]).write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    with studio("--run_dirs", tmp_path) as running:
        [run] = running.get("/api/runs")["runs"]
        samples = running.get(f"/api/runs/{run['id']}/samples")
        assert samples["steps"] == [0] and sorted(samples["left_out"]) == names
        (output / SAMPLE_FOLDER / names[1]).unlink()
        assert running.get(f"/api/runs/{run['id']}/samples")["left_out"] == [names[0]]
        shutil.rmtree(output)
        answer = running.client.get(f"/api/runs/{run['id']}")
        assert answer.status_code == 400 and "may be gone" in answer.json()["problem"]
        assert running.client.get(f"/runs/{run['id']}/samples/{samples['rows'][0]['images']['0']}").status_code == 404
        assert running.get("/api/runs")["runs"] == []
        shutil.rmtree(tmp_path)
        wait_for(lambda: running.get("/api/runs")["problems"])


def test_a_page_of_both_leads_from_one_to_the_other(tmp_path):
    folder = write_set(tmp_path / "images", {"a": ("cat", "a cat")})
    (tmp_path / "runs").mkdir()
    with studio(folder, "--run_dirs", tmp_path / "runs") as running:
        assert running.get("/api/runs") == {
            "runs": [],
            "problems": [],
            "roots": [str(tmp_path / "runs")],
            "has_set": True,
        }
        assert "<title>Studio</title>" in running.client.get("/").text


# -- in the browser ---------------------------------------------------------------------------------------------------


def test_a_person_watches_looks_and_compares(page, tmp_path):
    root = tmp_path / "runs"
    write_run(root / "output", MARKUP[:30].replace("/", ""), num_steps=60, sample_steps=[0, 20, 40, 60])
    second = write_run(root / "two", "second", began=BEGAN + timedelta(hours=1), has_end=False, sample_steps=[0, 40])
    with studio("--run_dirs", root) as running:
        page.goto(running.link.replace("/?", "/runs?"))
        page.locator(".run-item button", has_text="second").click()
        expect(page.locator(".chart")).to_have_count(5)
        expect(page.locator(".progress")).to_contain_text("step 100 of 100")
        with (Path(second.log_folder) / "more.tfevents").open("wb") as log:  # the run goes on
            log.write(scalar("loss/current", 101, 0.5) + scalar("loss/average", 101, 0.25))
        expect(page.locator(".chart .legend").first).to_contain_text("loss/average 0.25")
        write_samples(root / "two", "second", [80], began=BEGAN + timedelta(hours=1))
        write_grid(root / "two", "second", 80, began=BEGAN + timedelta(hours=1))
        page.get_by_role("tab", name="Samples").click()
        expect(page.locator("#shown-step")).to_have_text("80")
        expect(page.locator(".sample .under").first).to_have_text("step 80")
        page.keyboard.press("ArrowLeft")
        expect(page.locator(".sample .under")).to_have_text(["step 40", "step 40"])
        expect(page.locator(".picture.waiting")).to_have_count(0)
        page.get_by_role("button", name="Prompts and settings").first.click()
        expect(page.get_by_label("Prompt line")).to_have_value(
            "a cat on a sofa --e close-up, soft light --w 64 --h 64 --d 11 --l 7.5 --s 4 --ss euler_a"
        )
        page.get_by_role("button", name="Close").click()
        page.locator("button.picture").first.click()
        expect(page.locator(".compare [role=status]")).to_have_text("step 0 and step 40")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("+")
        page.keyboard.press("s")
        expect(page.locator(".compare [role=status]")).to_have_text("step 0 and step 80")
        transforms = page.locator(".compare img").evaluate_all("all => all.map((image) => image.style.transform)")
        assert transforms[0] == transforms[1] and "scale(1.5)" in transforms[0]
        page.keyboard.press("Escape")
        page.get_by_role("button", name="L × G").click()
        expect(page.locator(".sample.wide")).to_have_count(1)
        page.locator(".run-item input").last.check()
        expect(page.locator(".sample .of-run")).to_have_count(4)
        page.get_by_role("tab", name="Curves").click()
        expect(page.locator(".chart .legend li").nth(3)).to_be_visible()
        page.locator(".run-item button", has_text="second").click()
        page.get_by_role("button", name="Stop").click()
        wait_for(lambda: (root / "two" / "stop-second").is_file())
        assert page.title() == "Runs – Studio"


# -- a command --------------------------------------------------------------------------------------------------------


COUNTING = """
  window.decoded = 0;
  const decode = window.createImageBitmap;
  window.createImageBitmap = (file) => { window.decoded += 1; return decode(file); };
"""


def test_stepping_through_samples_fetches_and_decodes_each_image_once(page, tmp_path):
    write_run(tmp_path / "output", num_steps=40, sample_steps=range(40), side=16)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "edge=320" in request.url else None)
    page.add_init_script(COUNTING)
    with studio("--run_dirs", tmp_path) as running:
        run = of_name(running, "m")["id"]
        page.goto(running.link.replace("/?", "/runs?"))
        page.goto(f"{running.origin}/runs#runs={run}&view=look")
        for step in range(39, 0, -1):
            expect(page.locator("#shown-step")).to_have_text(str(step))
            expect(page.locator(".picture.waiting")).to_have_count(0)
            page.keyboard.press("ArrowLeft")
        expect(page.locator("#shown-step")).to_have_text("0")
        expect(page.locator(".picture.waiting")).to_have_count(0)
        assert (len(set(asked)), len(asked)) == (80, 80)
        assert page.evaluate("window.decoded") == 80


def test_a_command_is_checked_and_started_as_arguments_within_the_folders(running, tmp_path):
    form = running.get("/api/commands/form")
    assert len(form["presets"]) == 9 and form["roots"] == [str(running.root)]
    output = running.root / "new"
    nasty = "x; touch hacked $(touch hacked) `touch hacked` --output_dir=/tmp 'q\" \\"
    fields = {
        "output_dir": str(output),
        "output_name": "n",
        "metadata_title": nasty,
        "train_data_dir": str(running.root),
    }
    check = running.post("/api/commands/check", fields=fields, data_set=None).json()
    assert not check["is_right"] and "pretrained_model_name_or_path" in check["problems"]
    assert check["changed"] == list(fields)
    for name, value in (("output_dir", "/etc"), ("vae", "/etc/passwd"), ("dataset_class", "os.system"), ("x", "1")):
        check = running.post("/api/commands/check", fields={**fields, name: value}, data_set=None).json()
        assert name in check["problems"] and not check["is_right"]
        started = running.post("/api/commands/start", fields={**fields, name: value}, data_set=None)
        assert started.status_code == 400
    outside = {"general": {}, "datasets": [{"keys": {}, "subsets": [{"image_dir": "/etc"}]}]}
    check = running.post("/api/commands/check", fields=fields, data_set=outside).json()
    assert "outside of the opened folders" in check["others"][0]
    for body in ({}, {"fields": []}, {"fields": {}, "data_set": 3}, {"fields": {"output_dir": ["a"]}}):
        assert running.post("/api/commands/start", **body).status_code == 400
    assert not output.exists() and not Path("hacked").exists()
    assert running.client.get("/api/commands/start").status_code == 405
    assert running.get("/api/commands/preset", name="style/12gb")["fields"]["output_dir"] == f"{running.root}/output"
    assert running.client.get("/api/commands/preset", params={"name": "../x"}).status_code == 400
    of_run = running.get(f"/api/runs/{of_name(running, 'first')['id']}/command")["fields"]
    assert of_run["output_dir"] == str(running.root / "output") and of_run["learning_rate"] == "1e-05"


def test_axe_finds_nothing_on_the_page_of_runs(page, running):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def violations():
        found = axe.run(page).response["violations"]
        return [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]

    page.emulate_media(color_scheme="dark")
    page.goto(running.link.replace("/?", "/runs?"))
    page.locator(".run-item button", has_text="first").click()
    expect(page.locator(".chart")).to_have_count(5)
    assert violations() == []
    page.click("#theme")
    page.get_by_role("tab", name="Samples").click()
    page.locator("button.picture").first.click()
    assert violations() == []
    page.click("#new-run")
    page.get_by_label("Find an option").fill("learning_rate")
    page.locator("#field-learning_rate").fill("fast")
    expect(page.locator("#field-learning_rate-problem")).to_contain_text("expects a number")
    assert violations() == []
