"""The options of `gspn demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gspn.options.base import OptionSet, option
from gspn.places import check_file, check_run, run_folder


@dataclass(frozen=True, kw_only=True)
class DemoOptions(OptionSet):
    """All options of `gspn demo`."""

    plain: ClassVar = True

    run: Path | None = option(
        None,
        "A run folder, a saved model, or the name of trained weights: digits, digits-generator. Default: digits.",
        metavar="RUN",
        argument=True,
        parse=run_folder,
    )
    images: Path | None = option(None, "A folder with pictures to pick. Default: RUN/examples.", metavar="FOLDER")
    port: int | None = option(None, "Port of the page. Default: the first free one from 7860.", low=1, high=65535)
    no_browser: bool = option(False, "Do not open a browser window.")

    def check_paths(self):
        if self.run is not None and not (self.run / "model_index.json").exists():  # a saved pipeline has one
            check_run(self.run)
        if self.images is not None:
            check_file(self.images, "images", "a folder with pictures")
