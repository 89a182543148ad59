"""Makes a folder of emoji at 64 pixels on white, by category or with captions, from two npm packages that you download
first:

    npm pack @lobehub/fluent-emoji-3d@1.1.0      # 3,391 pictures, 256x256, named by code points (MIT)
    npm pack emoji-datasource-google@16.0.0      # emoji.json: name and category of each (MIT)
    for package in *.tgz; do mkdir "${package%.tgz}" && tar xzf "$package" -C "${package%.tgz}"; done
    python -m examples.emoji.data lobehub-fluent-emoji-3d-1.1.0/package emoji-datasource-google-16.0.0/package OUT

The program downloads nothing. OUT/train and OUT/test hold a PNG for every emoji that is in both packages: 1,852 in nine
categories (the tenth of emoji.json, Component, has no picture). A fifth of each category, always the same, is held out
for test. Emoji that look alike, such as clock faces, are in both splits.

With --captions OUT holds all of them and metadata.jsonl, with file_name and text, the emoji's name in lower case.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from gspn.data.images import decode, with_channels
from gspn.data.labelled import hold_out
from gspn.files import write_text


def emoji(pictures: Path, names: Path) -> list[tuple[dict, Path]]:
    """(row of emoji.json, picture file) of every emoji that has both, in the order of emoji.json."""
    files = {file.stem.lower(): file for file in (pictures / "assets").glob("*.webp")}
    found = []
    for row in json.loads((names / "emoji.json").read_text(encoding="utf-8")):
        codes = [code.lower() for code in (row["unified"], row["non_qualified"]) if code]
        found += [(row, files[code]) for code in codes if code in files][:1]
    return found


def save(file: Path, out: Path, size: int) -> None:
    """The picture as a PNG of `size` pixels a side, transparency laid on white."""
    with_channels(decode(file), 3).resize((size, size), Image.Resampling.BICUBIC).save(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="the folder `package` of @lobehub/fluent-emoji-3d")
    parser.add_argument("names", type=Path, help="the folder `package` of emoji-datasource-google")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--captions", action="store_true", help="one folder with captions instead of categories")
    arguments = parser.parse_args()

    found = emoji(arguments.pictures, arguments.names)
    if arguments.captions:
        arguments.out.mkdir(parents=True, exist_ok=True)
        lines = []
        for row, file in found:
            save(file, arguments.out / f"{file.stem}.png", arguments.size)
            lines.append(json.dumps({"file_name": f"{file.stem}.png", "text": row["name"].lower()}))
        write_text(arguments.out / "metadata.jsonl", "\n".join(lines) + "\n")
        print(f"{len(found)} images with captions in {arguments.out}")
        return
    categories = sorted({row["category"] for row, _ in found})
    train, test = hold_out([categories.index(row["category"]) for row, _ in found], 0.2)
    for split, numbers in (("train", train), ("test", test)):
        for number in numbers:
            row, file = found[number]
            folder = arguments.out / split / row["category"]
            folder.mkdir(parents=True, exist_ok=True)
            save(file, folder / f"{file.stem}.png", arguments.size)
    print(f"{len(train)} training and {len(test)} test images of {len(categories)} categories in {arguments.out}")


if __name__ == "__main__":
    main()
