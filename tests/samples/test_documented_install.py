"""Drawing after the documented install: every sampler with the packages of requirements.txt and what those need."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from library.samples.prompts import SAMPLERS

REPOSITORY = Path(__file__).parents[2]

# Draws with each sampler named before "--", in a Python that does not find the modules named behind it.
DRAW = """
import sys
from importlib.machinery import PathFinder

model, *words = sys.argv[1:]
samplers, hidden = words[: words.index("--")], frozenset(words[words.index("--") + 1 :])

class Finder:
    find_distributions = PathFinder.find_distributions

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder

import torch
from pathlib import Path
from library.samples.prompts import SamplePrompt
from library.samples.sampler import SamplingNetworks, draw_picture
from library.sdxl.checkpoint_file import ModelDtypes, read_single_file

model = read_single_file(Path(model), ModelDtypes(*[torch.float32] * 4))
networks = SamplingNetworks(model.unet, model.vae, model.text_encoder_l, model.text_encoder_g)
prompt = SamplePrompt("a cat", "photo", num_inference_steps=2)
for sampler in samplers:
    assert draw_picture(networks, prompt, sampler=sampler, width=64, height=64, seed=1).size == (64, 64), sampler
    print(sampler)
"""


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def named_by(requirements: Path) -> set[str]:
    """The packages that the file names, and those that they need, as far as they are installed."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    waiting = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]
    found: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if normalized(requirement.name) in found or (requirement.marker and not requirement.marker.evaluate()):
            continue
        found.add(normalized(requirement.name))
        try:
            needed = requires(requirement.name) or []
        except PackageNotFoundError:  # of another operating system
            continue
        waiting += [each for each in map(Requirement, needed) if "extra" not in str(each.marker)]
    return found


@pytest.fixture(scope="module")
def hidden_modules() -> list[str]:
    """Modules of packages that the tests have and the documented install has not."""
    documented = named_by(REPOSITORY / "requirements.txt")
    return sorted(
        module
        for module, packages in packages_distributions().items()
        if module.isidentifier() and not {normalized(package) for package in packages} & documented
    )


def test_every_sampler_draws_with_the_packages_of_the_documented_install(hidden_modules: list[str], tiny_sdxl: Path):
    assert "skimage" in hidden_modules
    command = [sys.executable, "-c", DRAW, str(tiny_sdxl), *SAMPLERS, "--", *hidden_modules]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8", check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == list(SAMPLERS)
