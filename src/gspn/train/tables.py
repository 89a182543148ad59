"""What Hugging Face `datasets` loads: tables on the disk, rows as they come (streaming), names on the hub."""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch

from gspn.digests import Content, Earlier
from gspn.train.images import SPLIT_NAMES, USUAL_CAPTIONS, DataError, Numbered, Split, decode

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
BUFFER = 2000  # rows of a stream that wait to be drawn
BATCH = 64  # rows of a table that are read at a time


def load_tables(
    source: str,
    path: Path | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    hint: str = "",
) -> dict[str, Split]:
    """Splits of what `datasets` loads.

    Args:
        source: "disk" (saved at path), a table format (a file at path), a folder (at path), or a name on the hub.
        image_column, label_column: where the columns' types do not tell.
        streaming: rows as they come. All labels are read first, for which the streams run through once.
        hint: what to add where it cannot be loaded.
    Errors: DataError.
    """
    name, tables = _load(source, path, streaming, hint)
    splits, unlabelled = {}, []
    for split, table in tables.items():
        if split not in SPLIT_NAMES:
            continue
        read = _table(table, name, image_column, label_column)
        if len(read) and bool((read.labels < 0).all()):
            unlabelled.append(split)
        elif bool((read.labels < 0).any()):
            raise DataError(f"the {split} split of {name} has labels below 0")
        else:
            splits[SPLIT_NAMES[split]] = read
    if not splits:
        raise DataError(
            f"{name} has the splits {', '.join(tables)}{' (without labels)' if unlabelled else ''}; expected train and "
            f"validation, valid or test"
        )
    return splits


def load_captioned(
    source: str,
    path: Path | None = None,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    hint: str = "",
) -> dict[str, Split]:
    """Splits of what `datasets` loads, with captions instead of labels, which are all 0.

    Args:
        caption_column: a text, or a list of texts; None is the only column of texts, or that one of them which is
            called text or caption. Others: as for `load_tables`.
    Errors: DataError.
    """
    name, tables = _load(source, path, streaming, hint)
    splits = {}
    for split, table in tables.items():
        if split in SPLIT_NAMES:
            splits[SPLIT_NAMES[split]] = _captioned(table, name, image_column, caption_column)
    if not splits:
        raise DataError(f"{name} has the splits {', '.join(tables)}; expected train, and validation, valid or test")
    return splits


def _load(source, path, streaming, hint):
    """(what to call it, {split as named there: table}). Errors: DataError."""
    import datasets

    name = str(path or source)
    if streaming and source == "disk":
        raise DataError(f"{name} was made by save_to_disk, which is read in place: it needs no streaming")
    try:
        if source == "disk":
            loaded = datasets.load_from_disk(name)
        elif path is not None and path.is_file():
            loaded = datasets.load_dataset(source, data_files=name, streaming=streaming)
        else:
            loaded = datasets.load_dataset(source, streaming=streaming)
    except Exception as error:  # `datasets` raises its own, its file systems', the hub's and arrow's exceptions
        reason = f"Hugging Face datasets cannot load it: {type(error).__name__}: {error}"
        raise DataError(f"DATA {name}: {reason}{hint}") from error
    return name, loaded if isinstance(loaded, dict) else {"train": loaded}


def _table(table, name, image_column, label_column):
    import datasets

    image_column = _image_column(table, image_column, name)
    label_column = _column(table, label_column, datasets.ClassLabel, "label", name)
    feature = table.features[label_column]
    labels, counts = _values(table, label_column, name)
    if isinstance(feature, datasets.ClassLabel):
        class_names = list(feature.names)
    else:
        class_names = [str(value) for value in sorted(set(labels))]
        number = {value: i for i, value in enumerate(class_names)}
        labels = [number[str(value)] for value in labels]
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


def _values(table, column, name):
    """(all values of a column, of a stream the number of rows of each shard). Errors: DataError where one is None."""
    import datasets

    counts = None
    if isinstance(table, datasets.IterableDataset):
        of_shards = [[row[column] for row in shard.select_columns(column)] for shard in _shards(table)]
        values, counts = list(chain.from_iterable(of_shards)), [len(each) for each in of_shards]
    else:
        values = list(table[column])
    if any(value is None for value in values):
        raise DataError(f"{name}: {sum(v is None for v in values)} rows have no value in the column {column!r}")
    return values, counts


def _split(table, image_column, name, counts, labels, class_names, **more):
    import datasets

    try:
        table = table.cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:
        raise DataError(f"{name}: the column {image_column!r} holds no images: {error}") from error
    names = Numbered(f"{name}, row")
    if counts is not None:
        more["remote"] = not Path(name).exists()
        return Stream(labels, class_names, table.select_columns(image_column), image_column, counts, names, **more)
    return Split(labels, class_names, read=_Rows(table, image_column), names=names, **more)


@dataclass(frozen=True)
class _Rows:
    """What a Split needs of a table of `datasets`."""

    table: object
    column: str

    def __call__(self, i):
        return _decoded(self.table[i][self.column])

    def identity(self) -> Iterator:
        yield Earlier(f"{self.table.features} {self.table.num_rows} {self.table.data.nbytes}")
        for rows in self.table.select_columns(self.column).with_format("arrow").iter(BATCH):
            yield from map(_content, rows[self.column].to_pylist())


def _decoded(cell):
    return decode(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])


def _content(cell):
    """A cell's undecoded image as the part of a digest; where the cell or its file lies does not count."""
    found = (cell or {}).get("bytes")
    return Content(found if found is not None else (cell or {}).get("path") or b"")


def _shards(table):
    """The streams that a streamed table is made of, one after the other."""
    return [table.shard(num_shards=table.num_shards, index=i) for i in range(table.num_shards)]


class Stream(Split):
    """Images that come one after the other, in shards: a Split of which only the loader's way is fast.

    `keys` reads the undecoded images, in the process that makes the batches; its workers decode them. The order is a
    function of the torch.Generator alone: shards in random order, then rows drawn from a buffer of BUFFER rows.
    """

    def __init__(self, labels, class_names, table, column, counts, names, captions=None, remote=False):
        super().__init__(labels, class_names, names=names, captions=captions)
        self.remote = remote
        self.table, self.column, self.counts = table, column, counts

    def image(self, i, cell=None):
        """The i-th image, from its `cell` if it is at hand. Without it the stream is read up to there."""
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
        first, count, place = sum(self.counts[:number]) + start, self.counts[number] - start, -1
        for place, row in enumerate(stream):
            if place < count:
                yield first + place, row[self.column]
        if place + 1 != count:
            raise DataError(f"shard {number} of the stream had {count} rows at first, and now {place + 1}: it changed")

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
        images = []
        for _, cell in islice(self._rows(), count):
            try:
                images.append(_decoded(cell))
            except Exception:
                continue
        if not images:
            raise DataError(f"none of the first {count} images can be read; the first: {self.problem(0)}")
        return images

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
    """The column to use: the one asked for, or the only one of texts that can be meant."""
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
    """Whether a column of that type holds texts, or lists of texts."""
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
