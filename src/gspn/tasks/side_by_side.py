"""Pictures of a distillation: what teacher and student draw of the same captions from the same noise."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gspn.data.images import generator
from gspn.models.latents import check_finite
from gspn.options.distill import DistillOptions
from gspn.plots import draw_grid, drawing_samples, save_picture
from gspn.tasks.text_to_image import lengths_untold


class SideBySide:
    """Draws RUN/samples/epoch-0001.png and so on: captions, evenly spaced, each with the teacher's image and the
    student's.

    Args:
        student: distill.Student. captions: of the held-out images. options: DistillOptions, resolved.
        folder: where the pictures are written.
    """

    def __init__(self, student, captions: Sequence[tuple], options: DistillOptions, folder: Path):
        at = np.unique(np.linspace(0, len(captions) - 1, min(len(captions), options.sample_captions)).astype(int))
        self.captions = [captions[i][0] for i in at]
        self.student, self.options, self.folder, self.taught = student, options, folder, None

    def __call__(self, epoch: int) -> Image.Image | None:
        """A picture; None in an epoch without one. Errors: SaveError; TrainingError for values that are not finite."""
        options = self.options
        if epoch % options.sample_every and epoch < options.epochs:
            return None
        with drawing_samples(epoch), lengths_untold():
            if self.taught is None:  # the teacher stays what it is
                with self.student.swap.use("attention"):
                    self.taught = self._images()
            pairs = [image for pair in zip(self.taught, self._images(), strict=True) for image in pair]
        title = f"teacher and student after epoch {epoch}, guidance {options.guidance:g}, {options.sample_steps} steps"
        labels = [row for row in range(len(self.captions)) for _ in range(2)]
        picture = draw_grid(pairs, labels, self.captions, title=title)
        save_picture(self.folder / f"epoch-{epoch:04}.png", picture)
        return picture

    def _images(self):
        """An image of each caption, one after the other, as they may be large. Raises NotFiniteError."""
        options, pipe, images = self.options, self.student.teacher.pipe, []
        for row, caption in enumerate(self.captions):
            pixels = pipe(
                caption,
                height=options.size[0],
                width=options.size[1],
                num_inference_steps=options.sample_steps,
                guidance_scale=options.guidance,
                generator=generator(options.seed, row),
                output_type="np",  # diffusers would turn NaN into black
            ).images
            check_finite(pixels)
            images += pipe.numpy_to_pil(pixels)
        return images
