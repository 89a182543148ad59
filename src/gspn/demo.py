"""The page of `gspn demo`. What it computes is in a class for each kind of run, without gradio; `page` shows it."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from gspn import plots, plots_masks
from gspn.data.folders import counts
from gspn.data.images import upright
from gspn.places import run_folder
from gspn.runs import MANY_PIXELS, Classifier, Segmentation, load_run

SIDE = 448  # pixels: the longer side of a small picture on the page, which is enlarged by a whole factor
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MARK = "#35e0ff"  # as in plots
AT_ONCE = 8  # images that a generator makes
BUTTONS = ("download", "fullscreen")  # not gradio's third, which uploads the picture
# Small pictures are enlarged to squares of one colour, as they are, instead of being smoothed.
CSS = "#picture img {width: 100%; height: 100%; object-fit: contain} .small img {image-rendering: pixelated}"
SMALL = 64  # pixels

Place = tuple[int, int]


def enlargement(height: int, width: int) -> int:
    """The whole factor by which a picture is enlarged on the page."""
    return max(1, SIDE // max(height, width))


def enlarged(pixels: Tensor, place: Place | None = None) -> Image.Image:
    """uint8 (C,H,W) as a picture of the page, with a frame around the pixel at `place`."""
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).convert("RGB")
    factor = enlargement(image.height, image.width)
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if place is not None:
        row, column = place
        around = max(0, 5 - factor)  # a frame around a single pixel of a large picture could not be seen
        box = [column * factor - around, row * factor - around]
        box += [(column + 1) * factor - 1 + around, (row + 1) * factor - 1 + around]
        ImageDraw.Draw(image).rectangle(box, outline=MARK, width=max(2, factor // 12))
    return image


def clicked(pixels: Tensor, x: float, y: float) -> Place:
    """The pixel (row, column) at (x, y) of its enlarged picture."""
    height, width = pixels.shape[1:]
    factor = enlargement(height, width)
    return min(max(int(y) // factor, 0), height - 1), min(max(int(x) // factor, 0), width - 1)


def as_picture(figure: Any) -> Image.Image:
    """A matplotlib figure as a PIL image."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return Image.open(file).convert("RGB")


@dataclass
class Classifying:
    """What the page shows of a classifier: an image as it sees it, the probable classes, the context of a pixel."""

    loaded: Classifier
    title = "Classify a picture"

    def pixels(self, image: Image.Image, times: float) -> Tensor:
        """The model's input, `times` as large as in training: uint8 (C,H,W)."""
        height, width = self.loaded.preprocessing.size
        size = max(1, round(height * times)), max(1, round(width * times))
        return replace(self.loaded.preprocessing, size=size)(upright(image))

    def answer(self, image: Image.Image, times: float) -> dict[str, float]:
        """{class: probability}. ValueError where two classes have the same name."""
        (ranked,) = self.loaded.rank(self.pixels(image, times)[None])
        return self.loaded.by_name(ranked)

    def context(self, pixels: Tensor, place: Place | None) -> Image.Image:
        """Where the context of a pixel comes from; None is the one in the middle."""
        normalize = self.loaded.preprocessing.normalize
        return as_picture(plots.context_figure(self.loaded.model, pixels, normalize, place))


@dataclass
class Segmenting:
    """What the page shows of a segmenter: an image as it sees it, the classes laid over it, the context of a pixel."""

    loaded: Segmentation
    title = "Give each pixel a class"

    def _scaled(self, times):
        return replace(self.loaded, scale=self.loaded.scale * times)

    def pixels(self, image: Image.Image, times: float) -> Tensor:
        """The model's input, `times` as large as in training: uint8 (C,H,W)."""
        return self._scaled(times).pixels(upright(image))

    def answer(self, image: Image.Image, times: float) -> Image.Image:
        """The image with the colours of its classes, and a legend."""
        image, loaded = upright(image), self._scaled(times)
        return plots_masks.overlay(image, loaded.numbers(image, loaded.allowed_bytes(image)), loaded.classes)

    def context(self, pixels: Tensor, place: Place | None) -> Image.Image:
        """Where the context of a pixel comes from, in the last block of the decoder; None is the one in the middle."""
        if pixels[0].numel() > MANY_PIXELS:
            raise ValueError(f"the context is drawn for up to {MANY_PIXELS:,} pixels: choose a smaller size")
        normalize = self.loaded.preprocessing.normalize
        return as_picture(plots.context_figure(self.loaded.model, pixels, normalize, place))


@dataclass
class Generating:
    """What the page shows of a generator: images of a class."""

    loaded: Any  # a GSPNPipeline, which needs diffusers
    title = "Make pictures of a class"

    @property
    def classes(self) -> list[str]:
        names = self.loaded.id2label
        return [names.get(number, str(number)) for number in range(self.loaded.num_classes)]

    def images(self, number: int, seed: int, times: float, guidance: float, steps: int) -> list[Image.Image]:
        """Pictures of the class with this number, `times` as large as in training."""
        config, factor = self.loaded.transformer.config, self.loaded.vae_scale_factor
        unit = config.patch_size * factor
        height, width = (max(unit, round(side * times / unit) * unit) for side in self.loaded.native_size)
        generators = [torch.Generator().manual_seed(seed * AT_ONCE + i) for i in range(AT_ONCE)]
        made = self.loaded([number] * AT_ONCE, guidance, steps, height, width, generator=generators).images
        return [enlarged(torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)) for image in made]


def subject(run: str | Path) -> Classifying | Segmenting | Generating:
    """What the page shows of RUN. Errors: those of gspn.load_run."""
    loaded = load_run(run)
    if isinstance(loaded, Classifier):
        return Classifying(loaded)
    if isinstance(loaded, Segmentation):
        return Segmenting(loaded)
    loaded.set_progress_bar_config(disable=True)
    return Generating(loaded)


def pictures_of(run: str | Path, folder: Path | None) -> list[Path]:
    """The pictures to pick: those in `folder`, or else in the folder "examples" of RUN, if there is one."""
    where = folder or run_folder(run) / "examples"
    files = (file for file in where.glob("*") if file.suffix.lower() in ENDINGS)
    return sorted(file for file in files if counts(file.name) and file.is_file())


def page(shown: Classifying | Segmenting | Generating, name: str, pictures: Sequence[Path] = ()) -> Any:
    """The page as gradio.Blocks. Nothing on it is loaded from other machines, and nothing is sent to them."""
    import gradio

    with gradio.Blocks(analytics_enabled=False, title=f"gspn: {name}") as blocks:
        gradio.Markdown(f"# {shown.title}\n{name}, with GSPN, on this machine")
        if isinstance(shown, Generating):
            _generating(gradio, shown)
        else:
            _looking(gradio, shown, pictures)
    return blocks


def _looking(gradio, shown, pictures):
    """The parts of the page where a model looks at a picture."""

    def look(image, times):
        if image is None:
            return None, None, None
        with _told(gradio):
            pixels = shown.pixels(image, times)
            seen, answer = enlarged(pixels), shown.answer(image, times)
            try:
                return seen, answer, shown.context(pixels, None)
            except ValueError as error:  # too many pixels for it; the answer stands without
                gradio.Warning(str(error))
                return seen, answer, None

    def click(image, times, event: gradio.SelectData):
        if image is None:
            return None, None
        with _told(gradio):
            pixels = shown.pixels(image, times)
            place = clicked(pixels, *event.index)
            return enlarged(pixels, place), shown.context(pixels, place)

    private = {"api_visibility": "private", "show_progress": "minimal"}
    private["concurrency_id"] = "model"  # one at a time: a look into the model would see another request's map
    small = max(shown.loaded.preprocessing.size) <= SMALL
    with gradio.Row():
        with gradio.Column(elem_classes=["small"] if small else None):
            image = gradio.Image(
                type="pil",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="Picture",
                height=260,
                format="png",
                buttons=[],
                elem_id="picture",
            )
            if pictures:
                files = [[str(file)] for file in pictures]
                gradio.Examples(files, image, label="Or pick one", examples_per_page=24, elem_id="picked")
            times = gradio.Slider(0.5, 4, 1, step=0.25, label="Size, as a multiple of that in training")
        with gradio.Column():
            gradio.Markdown("As the model sees it: **click a pixel**")  # a label would cover pixels
            seen = gradio.Image(show_label=False, interactive=False, format="png", buttons=[], elem_id="seen")
        with gradio.Column():
            if isinstance(shown, Classifying):
                answer = gradio.Label(num_top_classes=5, label="Class", elem_id="answer")
            else:
                answer = gradio.Image(
                    label="Classes", interactive=False, format="png", buttons=[*BUTTONS], elem_id="answer"
                )
    context = gradio.Image(show_label=False, interactive=False, format="png", buttons=[*BUTTONS], elem_id="context")
    for event in (image.change, times.release):
        event(look, [image, times], [seen, answer, context], **private)
    seen.select(click, [image, times], [seen, context], **private)


def _generating(gradio, shown):
    """The parts of the page where a generator makes pictures."""

    def make(number, seed, times, guidance, steps):
        with _told(gradio):
            return shown.images(number, int(seed or 0), times, guidance, int(steps))

    with gradio.Row():
        with gradio.Column():
            choices = [(name, number) for number, name in enumerate(shown.classes)]  # names may be equal
            chosen = gradio.Dropdown(choices, value=0, label="Class", elem_id="class")
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
            times = gradio.Slider(0.5, 4, 1, step=0.25, label="Size, as a multiple of that in training")
            guidance = gradio.Slider(1, 8, 2, step=0.5, label="Guidance: the weight of the class")
            steps = gradio.Slider(5, 100, 25, step=5, label="Steps from noise to picture")
            button = gradio.Button("Make pictures", variant="primary", elem_id="make")
        with gradio.Column(scale=2):
            made = gradio.Gallery(
                label="Pictures", columns=4, format="png", interactive=False, buttons=[*BUTTONS], elem_id="made"
            )
    button.click(make, [chosen, seed, times, guidance, steps], made, api_visibility="private")


class _told:
    """Shows the errors that a user can cause on the page."""

    def __init__(self, gradio):
        self.gradio = gradio

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, ValueError | OSError | RuntimeError):
            raise self.gradio.Error(str(error), print_exception=False) from error


def launch(blocks: Any, port: int | None = None, browser: bool = False) -> str:
    """Serves the page on this machine alone, in threads of this process; returns its address.

    Raises OSError if the port is not free."""
    import gradio

    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        inbrowser=browser,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        theme=theme,
        css=CSS,
    )
    return address
