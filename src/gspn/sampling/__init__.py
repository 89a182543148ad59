"""Images from trained generators, and latents from images: generators by name and from runs (`generators`), samples
(`sample`, `sample_folder`), the VAE (`vae`, `encode`).

Needs the extra `train` and, but for reading samples (`sample_folder`), `diffusion`.
"""

from gspn.extras import need

need("train")
