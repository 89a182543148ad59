"""The options of the commands around generators: sample, encode, fid."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gspn.options.base import REQUIRED, OptionSet, option, parse_parts, parse_size
from gspn.options.classifiers import WriteOptions
from gspn.options.training import DATA_HELP, ReadOptions
from gspn.places import OptionError, check_file, check_named, check_run, run_folder

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
PER_CLASS = 8


def check_vae(vae):
    """Raises OptionError for a VAE that does not exist; None is allowed."""
    if vae is not None:
        check_named(vae, "vae", "the folder of an AutoencoderKL, or a name on the hub")


@dataclass(frozen=True, kw_only=True)
class SampleOptions(OptionSet):
    """What to sample, and how."""

    panel: ClassVar = "Samples"

    classes: str = option("all", "Names or numbers of classes with commas between them, or all.", metavar="NAME,3,...")
    per_class: int | None = option(None, f"Images of each class. Default: {PER_CLASS}.", low=1, high=100_000_000)
    count: int | None = option(None, "Images in total; the classes take turns.", low=1, high=100_000_000)
    guidance: float = option(4.0, "Weight of the class: 1 is no guidance.", low=0)
    guidance_interval: tuple | None = option(
        None,
        "Guide only at timesteps between these parts of all, where 1 is pure noise. The other steps cost half as much. "
        "Default: everywhere.",
        parse=parse_parts,
        metavar="LOW,HIGH",
    )
    steps: int = option(50, "Steps from noise to image.", low=1, high=100_000)
    size: tuple | None = option(
        None, "Size of the images in pixels: N or HxW. Default: as in training.", parse=parse_size, metavar="N|HxW"
    )
    dilation: int = option(
        1,
        "For images about K times as large as in training, of GSPN-DiT: dilates noisy steps by K.",
        low=1,
        metavar="K",
    )
    dilate_from: float = option(0.7, "The part of all timesteps at which noisy steps begin.", low=0, high=1)
    enlarge: float | None = option(
        None,
        "For images larger than in training: draw them with as many pixels as in training, enlarge them, add noise and "
        "run this part of the steps again, such as 0.5.",
        low=0,
        high=1,
        metavar="PART",
    )
    timestep_shift: float = option(
        1.0,
        "For images about K times as large as in training: steps with K times as much noise. Needs ddpm, dpm-solver++, "
        "euler or heun.",
        low=1,
        metavar="K",
    )
    scheduler: str | None = option(
        None, f"{', '.join(SCHEDULERS)}. Default: the generator's own.", choices=tuple(SCHEDULERS)
    )
    seed: int = option(0, "Random seed: the same seed gives the same images.", low=0, high=2**63 - 1)
    precision: str = option("fp32", "Precision of the model: fp32 or bf16.", choices=("fp32", "bf16"))
    batch_size: int = option(16, "Images at a time, in each process.", low=1, high=1_000_000, resumable=True)
    grid: bool = option(True, "Draw grid.png, the first images of each class.", resumable=True)
    npz: bool = option(
        False, "Write samples.npz, in the format of ADM's evaluation.", flag="--npz/--no-npz", resumable=True
    )

    def idle(self) -> list[str]:
        """Notes on values that do nothing because of others."""
        if self.dilate_from != type(self).dilate_from and self.dilation == 1:
            return ["--dilate-from does nothing without --dilation"]
        return []


@dataclass(frozen=True, kw_only=True)
class SampleArguments(SampleOptions):
    """All options of `gspn sample`."""

    plain: ClassVar = True

    run: Path = option(
        REQUIRED,
        "A run of `gspn train-diffusion`, a saved GSPNPipeline, or the name of trained weights: digits-generator.",
        metavar="RUN",
        argument=True,
        parse=run_folder,
    )
    out: Path = option(REQUIRED, "The folder to make or to continue.")
    checkpoint: str = option("last", "Which checkpoint of the run: last or best.")
    vae: str | None = option(None, "Where the VAE of a run of latents is now, if it was moved.", metavar="PATH|NAME")

    def check_paths(self):
        if not (self.run / "model_index.json").exists():  # a saved pipeline has one
            check_run(self.run)
        check_vae(self.vae)


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(ReadOptions):
    """All options of `gspn encode`."""

    plain: ClassVar = True

    data: str = option(REQUIRED, DATA_HELP, metavar="DATA", argument=True)
    vae: str = option(REQUIRED, "An AutoencoderKL of diffusers: a folder, or a name on the hub.", metavar="PATH|NAME")
    size: tuple = option(
        REQUIRED, "Size to which images are resized before encoding.", parse=parse_size, metavar="N|HxW"
    )
    out: Path = option(REQUIRED, "The folder to make or to continue.")
    flip: bool = option(False, "Encode the mirrored images too.")
    dtype: str = option("fp32", "Dtype of the stored latents: fp32, bf16 or fp16.", choices=("fp32", "bf16", "fp16"))
    precision: str = option("fp32", "Precision of the VAE: fp32, or bf16 for autocast.", choices=("fp32", "bf16"))
    shard_size: int = option(4096, "Images per file.", low=1)
    batch_size: int = option(32, "Images per batch.", low=1)
    split: list[str] | None = option(None, "train, val or test; repeatable. Default: all.")
    val_fraction: float = option(
        0.1, "Fraction of the images to hold out where DATA has no evaluation split.", low=0, high=1
    )
    streaming: bool = option(False, "datasets: read rows as a stream, without a copy in its cache.")
    as_json: bool = option(False, "Print JSON.", flag="--json")

    def check_paths(self):
        check_named(self.data, "DATA", DATA_HELP)
        check_vae(self.vae)


@dataclass(frozen=True, kw_only=True)
class FidOptions(WriteOptions, ReadOptions):
    """All options of `gspn fid`."""

    samples: str = option(
        REQUIRED,
        "What `gspn sample` made, a folder of image files, an npz file in the format of ADM's evaluation, or DATA.",
        metavar="SAMPLES",
        argument=True,
    )
    reference: str = option(
        REQUIRED,
        "The reference: like SAMPLES, or a file of statistics (from --save, or with mu and sigma).",
        metavar="DATA",
    )
    features: str = option(
        "inception",
        "The network: inception[,FILE], classifier:RUN or timm:MODEL[,FILE]. Only inception gives FID.",
        metavar="NAME",
    )
    size: tuple | None = option(
        None, "Size at which to compare. Default: that of the reference.", parse=parse_size, metavar="N|HxW"
    )
    split: str | None = option(None, "Split of the reference. Default: train.")
    samples_split: str | None = option(None, "Split of samples that are DATA. Default: test, else val, else all.")
    batch_size: int = option(64, "Images per batch.", low=1, high=1_000_000)
    cache: Path | None = option(
        None, "Cache of statistics, keyed by a digest of the images. Default: ~/.cache/gspn/fid.", metavar="FOLDER"
    )
    no_cache: bool = option(False, "Use no cache.")
    save: Path | None = option(
        None,
        "Save the reference's statistics, for --reference: a .safetensors file.",
        metavar="FILE",
        suffix=".safetensors",
    )
    out: Path | None = option(None, "Write the result to a .json file.", metavar="FILE", suffix=".json")
    as_json: bool = option(False, "Print JSON.", flag="--json")

    def check_paths(self):
        if self.no_cache and self.cache:
            raise OptionError("choose one of --cache and --no-cache")
        for images, what in ((self.samples, "SAMPLES"), (self.reference, "reference")):
            a_file = Path(images).suffix in (".npz", ".safetensors")
            (check_file if a_file else check_named)(images, what, f"samples, images, an npz file, or DATA: {DATA_HELP}")
        kind, _, rest = self.features.partition(":")
        if kind == "classifier" and rest:
            check_run(rest)
        elif "," in self.features:
            check_file(self.features.partition(",")[2], "features", "a file of weights after the comma")
