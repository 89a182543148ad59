"""Images from trained generators, and latents from images: generators by name and from runs (`generators`), samples
(`sample`, `sample_folder`), the VAE (`vae`, `encode`).

Needs the extra `diffusion`, but for its options (`options`).
"""

from gspn.extras import need

need("train")
