"""Evaluation of classifiers (`classification`) and of generated samples against reference images (`fid`, `distances`,
`features`, `image_sets`, `image_statistics`).

Needs the extra `train`.
"""

from gspn.extras import need

need("train")
