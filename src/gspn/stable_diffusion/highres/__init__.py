"""Images far larger than a Stable Diffusion model was trained for."""

from gspn.stable_diffusion.highres.pipeline import HighResOutput, HighResPipeline
from gspn.stable_diffusion.highres.plan import Stage
from gspn.stable_diffusion.highres.savers import Savers

__all__ = ["HighResOutput", "HighResPipeline", "Savers", "Stage"]
