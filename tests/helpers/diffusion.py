"""What the tests of generation share: a tiny generator, a tiny VAE, a run that holds one."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler

from gspn.models.generator import GSPNTransformer2DModel
from gspn.train.run import Run

TINY = dict(hidden_size=32, depth=2)


def tiny_generator(**config) -> GSPNTransformer2DModel:
    """A GSPNTransformer2DModel whose output depends on everything, as that of a trained one."""
    torch.manual_seed(0)
    config = dict(sample_size=8, patch_size=2, in_channels=3, num_classes=5) | TINY | config
    return lively(GSPNTransformer2DModel(**config))


def lively(model):
    """The same model in evaluation mode, its last layers away from the zero that they start at."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[0] in ("modulation", "proj_out", "embed", "proj_out_1", "proj_out_2"):
                parameter.normal_(std=0.3 if name.startswith("embed") else 0.1)
    return model.eval()


def tiny_vae(**config) -> AutoencoderKL:
    """An AutoencoderKL that makes latents of half the size."""
    torch.manual_seed(1)
    blocks = dict(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2)
    blocks |= dict(up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)
    return AutoencoderKL(**blocks, latent_channels=4, **config).eval()


def ddpm(**config) -> DDPMScheduler:
    return DDPMScheduler(**dict(variance_type="learned_range", clip_sample=False) | config)


def generator_run(
    path, *, class_names=("one", "two", "three/3", "four", "five"), scheduler=None, vae=None, **arguments
):
    """A run folder as `gspn train-diffusion` makes it, of a generator with random weights, and that generator."""
    arguments = dict(sample_size=8, in_channels=3, num_classes=len(class_names)) | TINY | arguments
    model = tiny_generator(**arguments)
    size = [arguments["sample_size"]] * 2
    config = {
        "task": "diffusion",
        "model": {"name": "GSPN-micro/2", "arguments": arguments},
        "scheduler": {"class": "DDPMScheduler", "config": dict((scheduler or ddpm()).config)},
        "space": {"kind": "latents" if vae else "pixels", "size": size, "image_size": [side * 2 for side in size]},
        "vae": vae,
        "class_names": list(class_names),
    }
    if vae is None:
        config["space"]["image_size"] = size
    run = Run.create(path, config)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    raw = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    run.save_checkpoint("last", {"model": raw, "ema": weights}, {"epoch": 1, "step": 1})
    return run, model
