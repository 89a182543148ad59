"""What DATA means where images have captions: a folder with a list of captions or a text file beside each image;
shards; anything that `datasets` loads.

`open_captions` gives the same Data as labelled.open_data, whose splits have captions; loader.py makes batches of them.
"""

import csv
import json
from collections import Counter
from functools import partial
from pathlib import Path

from gspn.data.folders import by_split, is_image, walk
from gspn.data.images import USUAL_CAPTIONS, DataError, Split, listed, text_of
from gspn.data.labelled import Data, ImageFiles
from gspn.data.shards import json_caption, read_captioned
from gspn.data.sources import check_fraction, check_one_kind, no_data, read_source, with_held_out
from gspn.data.tables import TABLES, load_captioned
from gspn.places import location

CAPTIONED = (
    "a folder of images with metadata.jsonl, .csv or .parquet (each row a file_name and a text) or with a .txt file of "
    "the same name beside each image; a tar file or a folder of them (shards: 0001.jpg with 0001.txt or 0001.json); a "
    "folder that datasets' save_to_disk made; a parquet, arrow, csv or json file or a folder of them; or a name on the "
    "Hugging Face hub"
)
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def open_captions(
    data: str | Path,
    *,
    val_fraction: float = 0.1,
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
) -> Data:
    """Opens `data`, whatever kind it is.

    Args:
        data: a path, or a name on the Hugging Face hub (see CAPTIONED).
        val_fraction: the part of the images to hold out where there is no evaluation split, always the same.
        image_column: for `datasets`, where the types of the columns leave it open.
        caption_column: of a table, a list or JSON. Default: the only column of texts, or the one called text or
            caption.
        streaming: let `datasets` stream the rows.
    Returns: Data of the kind "captioned folder", "captioned shards" or "captioned datasets"; its splits have captions,
        their labels are all 0.
    Errors: DataError says what was found and what was expected.
    """
    name = str(data)
    columns = dict(image_column=image_column, caption_column=caption_column, streaming=streaming)
    check_fraction(val_fraction)
    kind, splits, notes = read_source(
        name,
        CAPTIONED,
        folder=partial(_open_folder, columns=columns),
        shards=partial(read_captioned, column=caption_column),
        tables=partial(load_captioned, **columns),
    )
    for option, given in (("streaming", streaming), ("image_column", image_column)):
        if given and kind != "datasets":
            raise DataError(f"{option} is for data that `datasets` loads, but {name} is of the kind {kind}")
    for split_name, split in splits.items():
        empty = sum(not any(text.strip() for text in captions) for captions in split.captions)
        if empty:
            notes = [*notes, f"{empty} of {len(split)} captions of the {split_name} split are empty"]
    splits, held_out = with_held_out(splits, val_fraction)
    if "all" in splits and "val" not in splits:
        raise DataError(f"{name} holds one image: expected two at least, one of them to evaluate on")
    return Data(f"captioned {kind}", location(data), splits, [*notes, *held_out])


def _open_folder(path, columns):
    """(kind, splits, notes) of a folder, by what lies in it."""
    found = walk(path)
    files, left_out = found.files, found.notes()
    lists = [file for file in files if file.name in LISTS]
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        splits, notes = load_captioned("disk", path, **columns)
        return "datasets", splits, notes
    shards = [file for file in files if file.suffix == ".tar"]
    images = [file for file in files if is_image(file)]
    # img2dataset writes a table and a .json beside every shard, folder or image, which repeat what is there
    known = {file.with_suffix("") for file in [*shards, *images]} | {file.parent for file in images}
    tables = [
        file
        for file in files
        if file.suffix in TABLES
        and file not in lists
        and not {file.with_suffix(""), file.with_name(file.stem.removesuffix("_stats"))} & known
    ]
    kinds = {
        "a list of captions": lists,
        "tar files": shards,
        "tables": tables,
        "images": [] if lists else images,
    }
    check_one_kind(path, kinds)
    if lists:
        kind, (splits, notes) = "folder", _listed(path, lists, images, columns["caption_column"])
    elif shards:
        kind, (splits, notes) = "shards", read_captioned(path, shards, columns["caption_column"])
    elif tables:
        kind, (splits, notes) = "datasets", load_captioned(str(path), path, found=found, **columns)
    elif images:
        kind, (splits, notes) = "folder", _beside(path, images, files, columns["caption_column"])
    else:
        raise no_data(path, CAPTIONED)
    return kind, splits, [*notes, *left_out]


def _splits(root, captions: dict[Path, tuple]) -> dict[str, Split]:
    """Splits of the images, by the names of their folders. Errors: DataError."""
    splits = {}
    for name, images in by_split(root, captions, "image", "images", folders=True).items():
        files, texts = ImageFiles(root, images), [captions[image] for image in images]
        splits[name] = Split([0] * len(images), None, read=files, names=files.name, captions=texts)
    return splits


# -- a text beside each image --


def _beside(root, images, files, column):
    """(splits, notes)."""
    if column is not None:
        raise DataError(f"caption_column {column!r} is for tables, lists and JSON, but {root} holds .txt files at most")
    twins = Counter(image.with_suffix("") for image in images)
    if len(twins) < len(images):
        first = next(image for image in images if twins[image.with_suffix("")] > 1)
        raise DataError(f"{root}: two images have the same name but for the ending, such as {first}")
    without = [image for image in images if not image.with_suffix(".txt").exists()]
    if without:
        raise DataError(
            f"{root}: {len(without)} of {len(images)} images have no caption, such as {without[0]}: expected a .txt "
            f"file of the same name beside each, or one of {', '.join(LISTS)} for all"
        )
    captions = {image: (" ".join(text_of(image.with_suffix(".txt")).split()),) for image in images}
    lonely = [file.name for file in files if file.suffix == ".txt" and file.with_suffix("") not in twins]
    notes = [f"ignored {listed(lonely, 'text', 'texts')} without an image"] if lonely else []
    return _splits(root, captions), notes


# -- a list of captions --


def _listed(root, lists, images, column):
    """(splits, notes) of the folder's metadata files, one at its root or one in each of its folders."""
    in_folder = Counter(file.parent for file in lists)
    if len(in_folder) < len(lists):
        folder = next(folder for folder, count in in_folder.items() if count > 1)
        names = " and ".join(file.name for file in lists if file.parent == folder)
        raise DataError(f"{folder} holds {names}: expected one of them")
    if len(lists) > 1 and any(file.parent == root for file in lists):
        raise DataError(f"{root} holds a list of captions, and others in its folders: expected one or the others")
    captions, seen = {}, {}
    for file in lists:
        for where, image, texts in _rows(file, column):
            if not image.is_file():
                raise DataError(f"{where} names {image}, which does not exist")
            if image in seen:
                raise DataError(f"{where} names {image}, which {seen[image]} names too: expected each image once")
            seen[image], captions[image] = where, texts
    more = [str(image.relative_to(root)) for image in images if image not in seen]
    notes = [f"ignored {listed(more, 'image', 'images')} without a caption"] if more else []
    return _splits(root, captions), notes


def _rows(file, column):
    """(name of the row for messages, path of the image, its captions) of every row of a metadata file."""
    read = {".jsonl": _json_lines, ".csv": _table_lines, ".parquet": _parquet_rows}[file.suffix]
    first = True
    for number, row in read(file):
        where = f"{file}, {'row' if file.suffix == '.parquet' else 'line'} {number}"
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise DataError(f"{where} has {', '.join(row) or 'no members'}: expected file_name, the path of an image")
        name = row.pop("file_name")
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise DataError(f"{where} names {name}: expected a path inside of {file.parent}")
        texts = [key for key, value in row.items() if isinstance(value, str | list)]
        if first and column is None and len(texts) == 1 and not set(row) & set(USUAL_CAPTIONS):
            column = texts[0]
        first = False
        yield where, file.parent / name, json_caption(json.dumps(row, default=lambda _: None), column, where)
    if first:
        raise DataError(f"{file} holds no rows; expected file_name and text in each")


def _json_lines(file):
    # not splitlines, which also cuts at characters that a JSON text may hold as they are, such as U+2028
    lines = text_of(file).split("\n")
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{line[:40]!r} is no JSON object")
                yield number, row
    except ValueError as error:
        raise DataError(f"{file}, line {number}: {error}") from error


def _parquet_rows(file):
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows = (row for batch in parquet.ParquetFile(file).iter_batches() for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read as a parquet file: {error}") from error


def _table_lines(file):
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error(f"expected {len(reader.fieldnames)} values, as the first line has names")
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a text in UTF-8: {error}") from error
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: {error}") from error
