"""GSPN inside Stable Diffusion: `swap` replaces a UNet's self-attention (`layer`, `init`, `file`), `fit` fits each new
layer to the attention that it replaced, `highres` makes images far larger than a model was trained for. Needs the extra
`diffusion`.
"""

from gspn.stable_diffusion.fitting import fit

__all__ = ["fit"]
