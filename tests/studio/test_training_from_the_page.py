"""A person's work with a run that really trains: written, started, watched, saved, stopped, resumed, compared."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect

from library.runs.control import stop
from library.runs.folders import runs_in
from library.runs.launch import TRAINER
from library.training.run_record import FINISHED, RUNS
from tests.studio.served import studio, wait_for

pytestmark = pytest.mark.slow
PATIENCE = 300.0


@pytest.fixture
def folder(prepared_set, tiny_sdxl, tmp_path):
    """A folder with set, model and prompts."""
    folder = tmp_path / "my runs"
    shutil.copytree(prepared_set.folder, folder / "set")
    shutil.copy(tiny_sdxl, folder / "tiny_sdxl.safetensors")
    prompts = "a cat --e close-up --w 64 --h 64 --s 1\na cup --e still life --w 64 --h 64 --s 1\n"
    (folder / "prompt.txt").write_text(prompts, encoding="utf-8")
    return folder


def options(folder: Path, output: str) -> dict[str, str]:
    return {
        "pretrained_model_name_or_path": f"{folder}/tiny_sdxl.safetensors",
        "in_json": f"{folder}/set/meta_lat.json",
        "train_data_dir": f"{folder}/set/images",
        "resolution": "128,128",
        "min_bucket_reso": "64",
        "max_bucket_reso": "256",
        "max_data_loader_n_workers": "0",
        "output_dir": f"{folder}/{output}",
        "output_name": output,
        "logging_dir": f"{folder}/logs",
        "sample_prompts": f"{folder}/prompt.txt",
        "sample_every_n_steps": "20",
        "max_train_steps": "100000",
        "seed": "1",
    }


def test_a_run_is_written_started_watched_saved_stopped_resumed_and_compared(page, folder):
    page.set_default_timeout(PATIENCE * 1000)
    expect.set_options(timeout=PATIENCE * 1000)
    output = folder / "first"
    with studio("--run_dirs", folder) as running:
        page.goto(running.link.replace("/?", "/runs?"))
        page.click("#new-run")
        find = page.get_by_label("Find an option")
        for name, value in options(folder, "first").items():
            find.fill(name)
            page.locator(f"#field-{name}").fill(value)
        find.fill("sample_at_first")
        page.locator("#field-sample_at_first").check()
        find.fill("fused_backward_pass")
        page.locator("#field-fused_backward_pass").check()
        find.fill("gradient_accumulation")
        page.locator("#field-gradient_accumulation_steps").fill("4")
        find.fill("")
        for name in ("fused_backward_pass", "gradient_accumulation_steps"):
            expect(page.locator(f"#field-{name}-problem")).to_contain_text("cannot accumulate gradients")
        expect(page.get_by_role("button", name="Start")).to_be_disabled()
        page.locator("#field-fused_backward_pass").uncheck()
        page.locator("#field-gradient_accumulation_steps").fill("")
        expect(page.locator(".summary")).to_contain_text("3 in 3 batches an epoch")
        page.get_by_role("button", name="Start").click()
        expect(page.locator(".run-head .state")).to_have_text("runs")
        expect(page.locator(".chart").first).to_be_visible()
        page.get_by_role("tab", name="Samples").click()
        expect(page.locator(".sample .under").first).to_contain_text("step")
        page.get_by_role("button", name="Save now").click()
        wait_for(lambda: list(output.glob("first-step*-state")), PATIENCE)
        page.get_by_role("tab", name="Log").click()
        expect(page.locator("pre.log")).to_contain_text("steps:")
    [run], _ = runs_in(output)
    assert run.state == RUNS  # the studio is closed, and the run goes on
    with studio("--run_dirs", folder) as running:
        page.goto(running.link.replace("/?", "/runs?"))
        page.locator(".run-item button", has_text="first").click()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".run-head .state")).to_have_text("stopped")
        page.get_by_role("button", name="Resume").click()
        expect(page.locator(".run-head .state")).to_have_text("runs")
        page.get_by_role("tab", name="Samples").click()
        page.locator("button.picture").first.click()
        expect(page.locator(".compare [role=status]")).to_contain_text("step 0 and step")
        [resumed], _ = runs_in(output)
        assert resumed.record is not None and len(resumed.record.starts) == 2 and len(resumed.launches) == 2
        stop(resumed)
        by_hand = {**options(folder, "by hand"), "max_train_steps": "2", "sample_every_n_steps": "1"}
        command = [sys.executable, str(TRAINER), *(f"--{name}={value}" for name, value in by_hand.items())]
        subprocess.run(command, check=True, capture_output=True)
        page.keyboard.press("Escape")
        page.locator(".run-item button", has_text="by hand").click()
        expect(page.locator(".run-head .state")).to_have_text(FINISHED)
        expect(page.locator(".sample .under").first).to_have_text("step 2")
        wait_for(lambda: runs_in(output)[0][0].state == "stopped", PATIENCE)
    record = json.loads(next((output / "run").glob("*.json")).read_text(encoding="utf-8"))
    assert record["end"]["outcome"] == "stopped"
