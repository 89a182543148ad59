"""What Hugging Face `datasets` loads: tables on disk, streams of rows, names on the hub."""

import io
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch

from gspn.data.folders import Found, by_split
from gspn.data.hub import out_of_reach
from gspn.data.images import (
    SPLIT_NAMES,
    USUAL_CAPTIONS,
    DataError,
    MaskedSplit,
    Numbered,
    Split,
    decode,
    labelled,
    listed,
    raise_if_of_machine,
)
from gspn.digests import Content, Earlier
from gspn.progress import bars_on_terminals_only

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
CLASSES = re.compile(r"u?int\d+|float\d+|bool|(large_)?string")  # types of columns that can hold classes
BUFFER = 2000  # rows of a stream to draw from
BATCH = 64  # rows of a table that are read at a time


def load_tables(
    source: str,
    path: Path | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    found: Found | None = None,
    around: tuple[str, str] = ("", ""),
) -> tuple[dict[str, Split], list[str]]:
    """Splits of what `datasets` loads, and notes for the user.

    Args:
        source: "disk" (saved at path), a table format (a file at path), a folder (at path), or a name on the hub.
        image_column, label_column: where the types of the columns leave it open. A label of -1 stands for none; a
            split in which all are -1 is left out.
        streaming: stream the rows. All labels are read first, in one pass over the stream.
        found: the content of the folder at path.
        around: beginning and end of the message if it cannot be loaded.
    Errors: DataError.
    """
    name, tables, notes = _load(source, path, streaming, found, around)
    read = {split: _table(table, name, image_column, label_column) for split, table in _known(tables, name, notes)}
    splits, unlabelled = labelled(read, name)
    if not splits:
        raise DataError(
            f"{name} has the splits {', '.join(tables)}{' (without labels)' if unlabelled else ''}; expected train and "
            f"validation, valid or test"
        )
    return splits, [*notes, *unlabelled]


def load_captioned(
    source: str,
    path: Path | None = None,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    found: Found | None = None,
    around: tuple[str, str] = ("", ""),
) -> tuple[dict[str, Split], list[str]]:
    """Splits of what `datasets` loads, with captions, and notes for the user. All labels are 0.

    Args:
        caption_column: a column of texts, or of lists of texts. None: the only one, or the one called text or caption.
        Others: as for `load_tables`.
    Errors: DataError.
    """
    name, tables, notes = _load(source, path, streaming, found, around)
    splits = {
        split: _captioned(table, name, image_column, caption_column) for split, table in _known(tables, name, notes)
    }
    if not splits:
        raise DataError(f"{name} has the splits {', '.join(tables)}; expected train, and validation, valid or test")
    return splits, notes


def load_masked(
    source: str,
    path: Path | None = None,
    *,
    image_column: str | None = None,
    mask_column: str | None = None,
    found: Found | None = None,
    around: tuple[str, str] = ("", ""),
) -> tuple[dict[str, Split], list[str]]:
    """Splits of what `datasets` loads, with masks, and notes for the user.

    Args:
        image_column, mask_column: None where there are two columns of images, and one of them is called image.
        Others: as for `load_tables`.
    Errors: DataError.
    """
    name, tables, notes = _load(source, path, False, found, around)
    splits = {split: _masked(table, name, image_column, mask_column) for split, table in _known(tables, name, notes)}
    if not splits:
        raise DataError(f"{name} has the splits {', '.join(tables)}; expected train, and validation, valid or test")
    return splits, notes


def _known(tables, name, notes):
    """[(split, table)] of the splits with a usual name; a note on the others."""
    others = [split for split in tables if split not in SPLIT_NAMES]
    if others:
        notes.append(f"left out {listed(others, 'split', 'splits')}, called neither {' nor '.join(SPLIT_NAMES)}")
    called: dict[str, list[str]] = {}
    for split in tables:
        called.setdefault(SPLIT_NAMES.get(split, ""), []).append(split)
    called.pop("", None)
    for names in called.values():
        if len(names) > 1:
            raise DataError(f"{name} has two splits for one purpose: {', '.join(names)}; expected one of them")
    return [(split, tables[names[0]]) for split, names in called.items()]


def _load(source, path, streaming, found, around):
    """(name for messages, {split as named there: table}, notes). Errors: DataError."""
    import datasets

    name, notes = str(path or source), []
    if streaming and source == "disk":
        raise DataError(f"{name} was made by save_to_disk, which is read in place: it needs no streaming")
    try:
        with bars_on_terminals_only():
            if source == "disk":
                loaded = datasets.load_from_disk(name)
            elif path is not None and path.is_file():
                loaded = datasets.load_dataset(source, data_files=name, streaming=streaming)
            elif path is not None:
                source, files = _in_folder(source, found, notes)
                loaded = datasets.load_dataset(source, data_files=files, streaming=streaming)
            else:
                with _reaching(source):
                    loaded = datasets.load_dataset(source, streaming=streaming)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises its own, its file systems', the hub's and arrow's exceptions
        reason = f"Hugging Face datasets cannot load it: {type(error).__name__}: {error}"
        beginning, end = around
        raise DataError(f"{beginning or f'DATA {name}: '}{reason}{end}") from error
    return name, loaded if isinstance(loaded, dict) else {"train": loaded}, notes


def _in_folder(source, found, notes):
    """(what to load, its files or None) of a folder of tables. `datasets` finds the files itself, except behind links
    to folders. Notes name the tables that it leaves out."""
    import datasets

    tables = [file for file in found.files if file.suffix in TABLES]
    own = os.path.realpath(found.root)
    if all(Path(os.path.realpath(file.parent)).is_relative_to(own) for file in tables):
        taken = datasets.load_dataset_builder(source).config.data_files or {}
        taken = {os.path.realpath(file) for files in taken.values() for file in files}
        left = [file for file in tables if os.path.realpath(file) not in taken]
        if left:
            notes.append(f"datasets leaves out {listed(found.names(left), 'table', 'tables')}")
        return source, None
    formats = sorted({TABLES[file.suffix] for file in tables})
    if len(formats) > 1:
        raise DataError(f"{found.root} holds {' and '.join(formats)} files: expected one format")
    of_split = by_split(found.root, tables, "table", "tables")
    return formats[0], {split: [str(file) for file in files] for split, files in of_split.items()}


@contextmanager
def _reaching(name):
    """Sets `datasets` offline for the block if the hub is out of reach, so that it uses its copy of `name` or fails at
    once. Errors: ConnectionError with the reason, if there is no copy."""
    import datasets

    problem = out_of_reach(name, "README.md", "dataset")
    if problem is None:
        yield
        return
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    except ConnectionError as error:
        raise ConnectionError(f"{problem}, and no copy of {name} is kept here") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _table(table, name, image_column, label_column):
    import datasets

    image_column = _image_column(table, image_column, name)
    label_column = _column(table, label_column, datasets.ClassLabel, "label", name)
    feature = table.features[label_column]
    plain = isinstance(feature, datasets.Value) and CLASSES.fullmatch(feature.dtype)
    if not plain and not isinstance(feature, datasets.ClassLabel):
        raise DataError(f"{name}: the column {label_column!r} holds {feature}, expected a class: a number or a text")
    labels, counts = _values(table, label_column, name)
    if isinstance(feature, datasets.ClassLabel):
        class_names = list(feature.names)
    else:
        classes = sorted(set(labels) - {-1})
        number = {value: i for i, value in enumerate(classes)} | {-1: -1}
        labels, class_names = [number[value] for value in labels], [str(value) for value in classes]
    return _split(table, image_column, name, counts, labels, class_names)


def _captioned(table, name, image_column, caption_column):
    image_column = _image_column(table, image_column, name)
    caption_column = _caption_column(table, caption_column, name)
    values, counts = _values(table, caption_column, name)
    captions = [(value,) if isinstance(value, str) else tuple(value) for value in values]
    empty = sum(not each or not all(isinstance(text, str) for text in each) for each in captions)
    if empty:
        raise DataError(f"{name}: {empty} rows have no caption in the column {caption_column!r}")
    return _split(table, image_column, name, counts, [0] * len(captions), None, captions=captions)


def _masked(table, name, image_column, mask_column):
    import datasets

    columns = [column for column, kind in table.features.items() if isinstance(kind, datasets.Image)]
    for wanted in filter(None, (image_column, mask_column)):
        _check_column(table, wanted, name)
    image = image_column or next((column for column in columns if column.lower() == "image"), None)
    others = [column for column in columns if column != image]
    mask = mask_column or (others[0] if image and len(others) == 1 else None)
    if image is None or mask is None or image == mask:
        raise DataError(
            f"{name}: expected two columns of images, image and another with the masks, found "
            f"{' and '.join(columns) or 'none'}; say which with --image-column and --mask-column. Its columns: "
            f"{', '.join(table.features)}"
        )
    for column in (image, mask):
        table = _undecoded(table, column, name)
    read, masks = (_Rows.of(table.select_columns(column), column) for column in (image, mask))
    return MaskedSplit(len(table), masks, read=read, names=Numbered(f"{name}, row"))


def _values(table, column, name):
    """(all values of a column; for a stream the number of rows of each shard). Errors: DataError where one is None."""
    import datasets

    counts = None
    if isinstance(table, datasets.IterableDataset):
        of_shards = [[row[column] for row in shard.select_columns(column)] for shard in _shards(table)]
        values, counts = list(chain.from_iterable(of_shards)), [len(each) for each in of_shards]
    else:
        values = list(table[column])
    missing = sum(value is None or value != value for value in values)  # NaN is not equal to itself
    if missing:
        raise DataError(f"{name}: {missing} rows have no value in the column {column!r}")
    return values, counts


def _undecoded(table, column, name):
    """The table with the undecoded images of a column. Errors: DataError."""
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise DataError(f"{name}: the column {column!r} holds no images: {error}") from error


def _split(table, image_column, name, counts, labels, class_names, **more):
    table = _undecoded(table, image_column, name)
    names = Numbered(f"{name}, row")
    if counts is not None:
        more["remote"] = not Path(name).exists()
        return Stream(labels, class_names, table.select_columns(image_column), image_column, counts, names, **more)
    return Split(labels, class_names, read=_Rows.of(table, image_column), names=names, **more)


@dataclass(frozen=True)
class _Rows:
    """The images of a table of `datasets`, as a Split reads them. `table` has their column alone, as `datasets` would
    decode the others too; `about` is what digests of gspn 0.1 hold of the whole table."""

    table: object
    column: str
    about: str

    @classmethod
    def of(cls, table, column):
        return cls(table.select_columns(column), column, f"{table.features} {table.num_rows} {table.data.nbytes}")

    def __call__(self, i):
        return _decoded(self.table[i][self.column])

    def identity(self) -> Iterator:
        yield Earlier(self.about)
        for rows in self.table.with_format("arrow").iter(BATCH):
            yield from map(_content, rows[self.column].to_pylist())


def _decoded(cell):
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError("the row has no image")
    return decode(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])


def _content(cell):
    """A cell's undecoded image as a part of a digest, wherever its file lies."""
    found = (cell or {}).get("bytes")
    return Content(found if found is not None else (cell or {}).get("path") or b"")


def _shards(table):
    """The shards of a streamed table, in order."""
    return [table.shard(num_shards=table.num_shards, index=i) for i in range(table.num_shards)]


class Stream(Split):
    """A Split of images that can only be read one after the other, in shards; `image` is slow without a cell.

    `keys` reads the undecoded images in the main process, and the workers decode them. The order is a function of the
    torch.Generator alone: shards in random order, then rows drawn from a buffer of BUFFER rows.
    """

    def __init__(self, labels, class_names, table, column, counts, names, captions=None, remote=False):
        super().__init__(labels, class_names, names=names, captions=captions)
        self.remote = remote
        self.table, self.column, self.counts = table, column, counts

    def image(self, i, cell=None):
        """The i-th image, from its `cell` if given. Otherwise the stream is read up to it."""
        return _decoded(next(self._rows(i))[1] if cell is None else cell)

    def keys(self, source=None):
        if source is None:
            return self._rows()
        order = torch.randperm(len(self.counts), generator=source).tolist()
        return self._drawn(chain.from_iterable(map(self._shard, order)), random.Random(source.initial_seed()))

    def _rows(self, start=0):
        """(index, cell) of all rows from `start` on, in order."""
        number = 0
        while start >= (count := self.counts[number]):
            number, start = number + 1, start - count
        rest = range(number + 1, len(self.counts))
        return chain(self._shard(number, start), chain.from_iterable(map(self._shard, rest)))

    def _shard(self, number, start=0):
        """(index, cell) of the rows of one shard. Errors: DataError if it has grown or shrunk."""
        stream = self.table.shard(num_shards=self.table.num_shards, index=number).skip(start)
        first, count, found = sum(self.counts[:number]) + start, self.counts[number] - start, 0
        for found, row in enumerate(stream, 1):
            if found <= count:
                yield first + found - 1, row[self.column]
        if found != count:
            raise DataError(f"shard {number} of the stream had {count} rows at first, and now {found}: it changed")

    @staticmethod
    def _drawn(rows, source):
        """The rows, each drawn from the BUFFER next ones."""
        waiting = []
        for row in rows:
            if len(waiting) < BUFFER:
                waiting.append(row)
                continue
            at = source.randrange(BUFFER)
            yield waiting[at]
            waiting[at] = row
        source.shuffle(waiting)
        yield from waiting

    def sample(self, count=32):
        found = False
        for _, cell in islice(self._rows(), count):
            try:
                image = _decoded(cell)
            except Exception as error:
                raise_if_of_machine(error)
                continue
            found = True
            yield image
        if not found:
            raise DataError(f"none of the first {count} images can be read; the first: {self.problem(0)}")

    def subset(self, index):
        raise DataError("nothing can be held out of a stream: expected a validation or test split beside train")

    def identity(self) -> Iterator:
        yield from super().identity()
        yield Earlier(repr((self.table.features, self.counts)))
        if self.remote:
            yield self.counts
        else:
            yield from (_content(cell) for _, cell in self._rows())


def _image_column(table, wanted, name):
    import datasets

    if table.features is None:
        raise DataError(f"{name} does not tell its columns' types as a stream: leave out --streaming")
    return _column(table, wanted, datasets.Image, "image", name)


def _caption_column(table, wanted, name):
    """The caption column: the one asked for, or the only one possible."""
    texts = [column for column, kind in table.features.items() if _is_text(kind) and not column.startswith("__")]
    if wanted is not None:
        _check_column(table, wanted, name)
        if wanted not in texts:
            raise DataError(f"{name}: the column {wanted!r} holds {table.features[wanted]}, expected texts")
        return wanted
    usual = [column for column in texts if column in USUAL_CAPTIONS]
    meant = texts if len(texts) == 1 else usual
    if len(meant) == 1:
        return meant[0]
    raise DataError(
        f"{name}: expected one column of texts, or one called {' or '.join(USUAL_CAPTIONS)}, found "
        f"{' and '.join(meant or texts) or 'none'}; say which with --caption-column. Its columns: "
        f"{', '.join(table.features)}"
    )


def _is_text(kind):
    """Whether a column of this type holds texts, or lists of texts."""
    kind = getattr(kind, "feature", kind)
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _check_column(table, wanted, name):
    if wanted not in table.features:
        raise DataError(f"{name} has no column {wanted!r}; it has {', '.join(table.features)}")


def _column(table, wanted, feature, what, name):
    """The column to use: the one asked for, or the only one of that feature type."""
    if wanted is not None:
        _check_column(table, wanted, name)
        return wanted
    columns = [column for column, type_ in table.features.items() if isinstance(type_, feature)]
    if len(columns) == 1:
        return columns[0]
    types = ", ".join(f"{column} ({type(type_).__name__})" for column, type_ in table.features.items())
    found = "none" if not columns else " and ".join(columns)
    raise DataError(
        f"{name}: expected one column of type {feature.__name__}, found {found}; say which with --{what}-column. "
        f"Its columns: {types}"
    )
