"""Generators: what is learned (`objective`), the task for the loop (`task`), models by name and from runs
(`generators`), latents (`encode`, `latents`, `latent_files`, `vae`), samples (`sample`, `sample_files`, `grid`), how
near they are to other images (`fid`, `distances`, `features`, `imagesets`, `image_statistics`). Text to image:
distilling Stable Diffusion (`distill`, `student`, `text_to_image`, `side_by_side`).

Needs the extra `diffusion`; importing this package without it raises ImportError with the command that installs it.
"""

from importlib.util import find_spec

if find_spec("diffusers") is None:
    raise ImportError('generation needs diffusers: install with pip install "gspn[diffusion]"')
