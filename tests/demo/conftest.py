"""The tiny SDXL that has learnt to draw, and what reads its pictures."""

from pathlib import Path

import pytest

import quickstart
from demo.classifier import Classifier, load_classifier
from demo.figures import load_networks
from library.samples.sampler import SamplingNetworks


@pytest.fixture(scope="session")
def trained_sdxl() -> Path:
    """The single file that lies in the repository; not to be written to."""
    return quickstart.ROOT / quickstart.DEMO_MODEL


@pytest.fixture(scope="session")
def trained_networks(trained_sdxl: Path) -> SamplingNetworks:
    """Its networks in float32; not to be changed."""
    return load_networks(trained_sdxl)


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    """The network that tells what a picture shows."""
    return load_classifier()
