"""What DATA means, and how it becomes batches.

    labelled, captions     what the user names, to splits of images with classes or captions
    sources                what these two have in common
    folders                which files count; class_folders, idx, shards, tables, hub: the kinds of DATA
    images, augment        what an image's values are, preprocessing, augmentation
    loader                 splits to batches, in an order that can be repeated
    latents, latent_files  what `gspn encode` makes
    unreadable             images that could not be read

Needs the extra `train`.
"""

from gspn.extras import need

need("train")
