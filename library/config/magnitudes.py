"""The largest numbers that options take: far above what anybody needs, far below what would never end."""

MOST_STEPS = 10_000_000
"""Optimizer steps, and epochs of at least one step: half a year of five steps a second."""
MOST_BATCHES = 10_000
"""Micro-batches of a step, repeats of an image in an epoch, and other counts that multiply the work of a step."""
MOST_IMAGES_AT_ONCE = 4096
MOST_WORKERS = 1024
MOST_SEED = 2**32 - 1
HIGHEST_RATE = 1000.0
HIGHEST_NORM = 1e9
DDP_TIMEOUT = 30.0
MOST_MINUTES = 10_000.0
HEAVIEST = 1000
"""The weight of an image in the loss."""
MOST_VISITS = 100_000_000
"""Images in an epoch, repeats included; their order takes some hundred bytes each."""
