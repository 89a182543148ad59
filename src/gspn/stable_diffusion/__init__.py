"""GSPN inside Stable Diffusion: `swap` replaces a UNet's self-attention (`layer`, `init`, `file`, `keeping`), `fit`
fits each new layer to the attention that it replaced, `rank` says which replacement costs most, `highres` makes images
far larger than a model was trained for. Needs the extra `diffusion`.
"""

from gspn.stable_diffusion.feature_maps import rank
from gspn.stable_diffusion.fitting import fit

__all__ = ["fit", "rank"]
