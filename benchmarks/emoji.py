"""Makes a folder of class folders, emoji by category at 64 pixels, out of two npm packages that the caller fetched:

    npm pack @lobehub/fluent-emoji-3d@1.1.0      # 3,391 pictures, 256x256, named by code points (MIT)
    npm pack emoji-datasource-google@16.0.0      # emoji.json: the category of each (MIT)
    for package in *.tgz; do mkdir "${package%.tgz}" && tar xzf "$package" -C "${package%.tgz}"; done
    python -m benchmarks.emoji lobehub-fluent-emoji-3d-1.1.0/package emoji-datasource-google-16.0.0/package OUT

Nothing is fetched here. OUT/train and OUT/test hold a PNG for every emoji that is in both packages: 1,852 in nine
categories (the tenth of emoji.json, Component, has no picture). A fifth of each category is held out for test, the
same one every time. Emoji that look alike, such as clock faces, are on both sides.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from gspn.train.data import hold_out
from gspn.train.images import decode, with_channels


def emoji(pictures: Path, names: Path) -> list[tuple[str, Path]]:
    """(category, picture) of every emoji that has both, in the order of emoji.json."""
    files = {file.stem.lower(): file for file in (pictures / "assets").glob("*.webp")}
    found = []
    for row in json.loads((names / "emoji.json").read_text(encoding="utf-8")):
        codes = [code.lower() for code in (row["unified"], row["non_qualified"]) if code]
        found += [(row["category"], files[code]) for code in codes if code in files][:1]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="the folder `package` of @lobehub/fluent-emoji-3d")
    parser.add_argument("names", type=Path, help="the folder `package` of emoji-datasource-google")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    arguments = parser.parse_args()

    found = emoji(arguments.pictures, arguments.names)
    categories = sorted({category for category, _ in found})
    train, test = hold_out([categories.index(category) for category, _ in found], 0.2)
    for split, numbers in (("train", train), ("test", test)):
        for number in numbers:
            category, file = found[number]
            folder = arguments.out / split / category
            folder.mkdir(parents=True, exist_ok=True)
            image = with_channels(decode(file), 3).resize((arguments.size,) * 2, Image.Resampling.BICUBIC)
            image.save(folder / f"{file.stem}.png")
    print(f"{len(train)} training and {len(test)} test images of {len(categories)} categories in {arguments.out}")


if __name__ == "__main__":
    main()
