"""The shared modules, in five wings: config, sdxl, data, diffusion, training.

Each wing may import only from those named before it.
"""
