"""The shared modules, in five wings: config, sdxl, data, diffusion, training (each may import only from those before it)."""
