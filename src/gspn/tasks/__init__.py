"""What is trained, from the command to the run folder: one module a task.

    base         what tasks share: start and resume
    classify     image classification; finetune: from trained weights
    diffusion    class-conditional generation; objective: what is learned
    distill      Stable Diffusion with GSPN; student, text_to_image, side_by_side

Needs the extra `train`, and for diffusion and distill `diffusion`.
"""

from gspn.extras import need

need("train")
