"""Images far larger than a Stable Diffusion model was trained for."""

from gspn.models.highres.pipeline import HighResOutput, HighResPipeline
from gspn.models.highres.plan import Stage
from gspn.models.highres.savers import Savers

__all__ = ["HighResOutput", "HighResPipeline", "Savers", "Stage"]
