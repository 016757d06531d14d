"""quickstart.py: the installation that is done once, the demo, and the message where a step fails."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import quickstart
from quickstart import Environment, QuickstartError

REPOSITORY = Path(__file__).parents[1]
HERE = Environment(Path(sys.prefix))
"""The environment that the tests run in: it has everything installed."""


def add_requirements(folder, text):
    path = folder / "requirements.txt"
    path.write_text(text, encoding="utf-8")
    return path


# -- Python -----------------------------------------------------------------------------------------------------------


def test_an_old_python_is_told_what_is_needed():
    with pytest.raises(QuickstartError, match=r"needs Python 3\.11 or newer, and this is Python 3\.10\.12"):
        quickstart.require_python((3, 10, 12))
    quickstart.require_python((3, 11, 0))
    quickstart.require_python((4, 0, 0))


def test_an_old_python_gets_as_far_as_that_message():
    source = (REPOSITORY / "quickstart.py").read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 7))  # the first that knows the __future__ import on its first line
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


# -- installation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory):
    """A real environment without packages."""
    folder = tmp_path_factory.mktemp("an environment") / "with a space"
    quickstart.install(Environment(folder), add_requirements(folder.parent, "# nothing\n"))
    return Environment(folder)


def test_the_environment_has_a_python_of_its_own_in_front_of_the_path(empty_environment):
    program = "import sys; print(sys.prefix)"
    printed = subprocess.run(
        [empty_environment.program("python"), "-c", program],
        env=empty_environment.variables(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(printed.strip()).samefile(empty_environment.folder)
    assert empty_environment.variables()["PATH"].startswith(str(empty_environment.programs) + os.pathsep)


def test_what_is_installed_is_not_installed_again(empty_environment, capfd):
    requirements = empty_environment.folder.parent / "requirements.txt"
    quickstart.install(empty_environment, requirements)
    assert capfd.readouterr().out == ""


def test_changed_requirements_are_installed(empty_environment, tmp_path, capfd):
    requirements = add_requirements(tmp_path, "# one\n")
    (tmp_path / "requirements-dev.txt").write_text("-r requirements.txt\n", encoding="utf-8")
    before = quickstart.fingerprint(requirements), quickstart.fingerprint(tmp_path / "requirements-dev.txt")
    quickstart.install(empty_environment, requirements)
    add_requirements(tmp_path, "# two\n")
    after = quickstart.fingerprint(requirements), quickstart.fingerprint(tmp_path / "requirements-dev.txt")
    assert len({*before, *after}) == 4  # the file that includes it has changed as well
    capfd.readouterr()
    quickstart.install(empty_environment, requirements)
    assert "about 6 GB" in capfd.readouterr().out


def test_an_installation_that_fails_leaves_no_stamp(tmp_path, empty_environment):
    requirements = add_requirements(tmp_path, "./there-is-no-such-package\n")
    environment = Environment(empty_environment.folder)
    environment.stamp(requirements).unlink(missing_ok=True)
    with pytest.raises(QuickstartError, match="pip install"):
        quickstart.install(environment, requirements)
    assert not environment.stamp(requirements).exists()


@pytest.mark.slow  # an installation
@pytest.mark.heavy
def test_an_environment_that_was_cut_short_is_made_whole(tmp_path):
    environment = Environment(tmp_path / "environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.folder], check=True)
    assert not environment.is_whole
    quickstart.install(environment, add_requirements(tmp_path, ""))
    assert environment.is_whole


def test_a_folder_of_other_things_is_not_made_an_environment(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "01.jpg").write_bytes(b"")
    with pytest.raises(QuickstartError, match="not a virtual environment"):
        quickstart.install(Environment(tmp_path / "photos"), add_requirements(tmp_path, ""))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["01.jpg"]


# -- commands ---------------------------------------------------------------------------------------------------------


def test_a_failing_step_is_named_with_its_command_and_its_exit_status(capfd):
    with pytest.raises(QuickstartError) as caught:
        quickstart.run(["python", "-c", "raise SystemExit(7)"], HERE)
    assert caught.value.exit_status == 7
    assert str(caught.value) == 'this command ended with exit status 7:\n  python -c "raise SystemExit(7)"'
    assert capfd.readouterr().out == '\n> python -c "raise SystemExit(7)"\n'


def test_commands_are_shown_as_one_would_type_them():
    command = [
        "python",
        "a b.py",
        "--output_dir=my set/out",
        "--full_bf16",
        "--optimizer_args",
        "scale_parameter=False",
    ]
    typed = 'python "a b.py" --output_dir="my set/out" --full_bf16 --optimizer_args scale_parameter=False'
    assert quickstart.shown(command) == typed


@pytest.mark.parametrize(
    ("line", "command", "folder", "for_pytest"),
    [
        (["demo"], "demo", "from the variable", []),
        (["test", "-k", "not a", "tests/demo"], "test", "from the variable", ["-k", "not a", "tests/demo"]),
        (["test", "--venv", "given", "-vv"], "test", "given", ["-vv"]),
        (["install", "--venv=given"], "install", "given", []),
    ],
)
def test_the_environment_comes_from_the_flag_or_the_variable_and_the_rest_goes_to_pytest(
    monkeypatch, line, command, folder, for_pytest
):
    monkeypatch.setenv("SDXL_VENV", "from the variable")
    arguments, rest = quickstart.parse_arguments(line)
    assert (arguments.command, arguments.venv, rest) == (command, Path(folder), for_pytest)


def test_without_flag_and_variable_the_environment_lies_in_the_checkout(monkeypatch):
    monkeypatch.delenv("SDXL_VENV", raising=False)
    assert quickstart.parse_arguments(["demo"])[0].venv == REPOSITORY / ".venv"


def test_only_the_tests_take_further_arguments(capsys):
    with pytest.raises(SystemExit) as caught:
        quickstart.parse_arguments(["demo", "--steps=5"])
    assert caught.value.code == 2
    assert "--steps=5" in capsys.readouterr().err


@pytest.mark.heavy
def test_the_exit_status_of_the_tests_is_that_of_pytest(tmp_path):
    passing, failing = tmp_path / "test_passing.py", tmp_path / "test_failing.py"
    passing.write_text("def test_it():\n    assert True\n", encoding="utf-8")
    failing.write_text("def test_it():\n    assert False\n", encoding="utf-8")
    options = ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", "--numprocesses=0"]
    assert quickstart.run_tests(HERE, [*options, str(passing)]) == 0
    assert quickstart.run_tests(HERE, [*options, str(failing)]) == 1


# -- the demo ---------------------------------------------------------------------------------------------------------


def test_an_earlier_demo_is_kept_under_another_name(tmp_path, capsys):
    folder = tmp_path / "my set"
    quickstart.set_aside(folder)  # there is none
    for number in (1, 2):
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "mine.png").write_bytes(bytes([number]))
        quickstart.set_aside(folder)
        assert f"is kept as '{folder} ({number})'" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my set (1)", "my set (2)"]
    assert (tmp_path / "my set (1)" / "images" / "mine.png").read_bytes() == b"\1"


@pytest.mark.slow  # minutes; tests/test_workflow.py runs the same commands
@pytest.mark.trains
def test_the_demo_runs_the_workflow_and_says_where_its_pictures_and_figures_are(tmp_path, capfd):
    folder = tmp_path / "my set"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "left over.png").write_bytes(b"cut short")  # an earlier demo was aborted here
    prompts = tmp_path / "prompt.txt"
    prompts.write_text("a red circle --e outline --d 1 --s 1\na blue star --e framed --s 1\n", encoding="utf-8")
    size = quickstart.DemoSize(num_steps=1, num_pictures=6, prompts=str(prompts), scenes_per_pair=1)
    quickstart.run_demo(HERE, folder, size)

    assert (tmp_path / "my set (1)" / "images" / "left over.png").is_file()
    assert len(list((folder / "images").glob("*.npz"))) == len(list((folder / "images").glob("*.png"))) == 6
    samples = sorted(path.name for path in (folder / "output" / "sample").glob("*.png"))
    assert [name.split("_")[3:] for name in samples] == [
        [step, *rest] for step in ("000000", "000001") for rest in (["00", "1.png"], ["01.png"], ["grid.png"])
    ]
    with Image.open(folder / "output" / "sample" / samples[0]) as sample:
        assert sample.size == (96, 96)
        assert sample.text["prompt_g"] == "a red circle"
        assert sample.text["prompt_l"] == "outline"
    assert list((folder / "logs").rglob("events.out.tfevents.*"))
    assert "content right" in (folder / "figures.txt").read_text(encoding="utf-8")

    printed = capfd.readouterr().out
    report = printed[printed.index("The demo finished") :]
    shown = (
        "contact_sheet.png",
        "run_report.html",
        "figures.txt",
        *(f"output/sample/{name}" for name in samples if "grid" in name),
    )
    for path in (*shown, "images", "meta_lat.json", "output/sample", "output/finetuned_model.safetensors", "logs"):
        assert (folder / path).exists()
        assert f"{folder.as_posix()}/{path}" in report
