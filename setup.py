"""Makes `library` importable from anywhere after `pip install -e .`; the scripts themselves run from the checkout."""

from setuptools import find_packages, setup

setup(
    name="sdxl-two-captions",
    version="0.1.0",
    description="Fine-tune Stable Diffusion XL with a separate caption for each of its two text encoders",
    packages=find_packages(include=["library", "library.*"]),
    python_requires=">=3.11",
)
