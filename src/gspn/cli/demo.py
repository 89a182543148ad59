"""The command that opens a page to try a model: demo."""

from gspn import weights
from gspn.cli.app import command, out
from gspn.extras import need
from gspn.options import OptionError
from gspn.options.demo import DemoOptions
from gspn.progress import Progress


@command("demo", DemoOptions)
def demo(options):
    """Open a page to try a trained model; without RUN, the shipped classifier of digits.

    It classifies, segments or makes pictures. A click on a pixel shows where its context comes from. The page is
    served to this machine alone and needs no network. Ctrl+C ends it. Example: gspn demo runs/first --images photos
    """
    need("demo")
    with Progress("opening the page", console=out):
        from gspn.demo import ENDINGS, launch, page, pictures_of, subject

        run = weights.folder("digits") if options.run is None else options.run
        pictures = pictures_of(run, options.images)
        if options.images and not pictures:
            raise OptionError(f"images: there are no pictures in {options.images}, expected {', '.join(ENDINGS)}")
        blocks = page(subject(run), run.name, pictures)
        try:
            address = launch(blocks, options.port, not options.no_browser)
        except OSError as error:
            where = options.port or "any port from 7860 on"
            raise OptionError(f"port: {where} is not free; choose another one") from error
    out.print(f"{address} is open; Ctrl+C ends it", markup=False, highlight=False)
    blocks.block_thread()
