"""What tests of the training wing share."""

from collections.abc import Iterator

import pytest
import torch

from library.training import compiled


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """A machine on which `torch.compile` finds no C++ compiler."""
    caches = (compiled.why_not_compiled, compiled._can_compile)
    for cached in caches:
        cached.cache_clear()
    torch._dynamo.reset()  # it would run what it has compiled before
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        yield
    for cached in caches:
        cached.cache_clear()
