"""What every training shares: the loop (`loop`, `optim`, `state`, `board`) and the run folder (`run`).

Needs the extra `train`; importing this package without it raises ImportError with the command that installs it.
"""

from gspn.extras import need

need("train")
