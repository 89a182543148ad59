"""How good it is: classification (`classification`); how near samples are to other images (`fid`, `distances`,
`features`, `image_sets`, `image_statistics`).

Needs the extra `train`.
"""

from gspn.extras import need

need("train")
