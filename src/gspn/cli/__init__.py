"""The `gspn` command. training.py makes the commands that train, from the TaskSpec of each task; classify.py has the
commands around classifiers, segment.py that of segmenters, generate.py those around generators, bench.py the one that
measures, demo.py the one that opens a page, doctor.py the one that looks at the installation; app.py is what they
share.
"""

from gspn.extras import need

try:
    need("train")
except ImportError as error:
    raise SystemExit(f"gspn: {error}") from None

from gspn.cli import bench as bench  # it adds its command
from gspn.cli import classify, training
from gspn.cli import demo as demo  # it adds its command
from gspn.cli import doctor as doctor  # it adds its command
from gspn.cli import generate as generate  # it adds its commands
from gspn.cli import segment as segment  # it adds its command
from gspn.cli.app import app, main
from gspn.options import TASKS

REPORTS = {"classification": classify.report}  # instead of training.report_files

for _spec in TASKS.values():
    training.add_command(_spec, REPORTS.get(_spec.name, training.report_files))

__all__ = ["app", "main"]
