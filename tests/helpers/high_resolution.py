"""What the tests of high resolution share."""

from gspn.stable_diffusion.highres import HighResPipeline

FEW = dict(native_steps=2, steps=4, strengths=0.6, seed=3)
PLAIN = dict(blend=None, dilation=None, rematch=False)


def latents_of(pipe, **arguments):
    """The latents after each stage."""
    arguments = FEW | {"stages": [(16, 16), (24, 32)]} | arguments
    return HighResPipeline(pipe)("a red fox", output_type="latent", **arguments).stages
