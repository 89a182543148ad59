"""GSPN inside Stable Diffusion: `swap` puts it in the place of self-attention (`layer`, `init`, `file`), `highres`
makes images far larger than a model was trained for. Needs the extra `diffusion`.
"""
