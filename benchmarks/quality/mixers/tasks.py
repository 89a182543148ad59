"""The four tasks, all on CIFAR-10's photos: what a batch is, what the loss is, and how a trained model is measured.

classes   Which of ten classes is the photo of? Chance: 10%.
far       Do the two ends of a long canvas come from one photo? See Far.
filling   What is in the hidden parts of a photo? Mean squared error; see Filling.
tracing   Which tokens on two curves over a photo are on the one with the red dot? See Tracing.

Batches depend on the seed alone: every contender sees the same images in the same order with the same augmentation.
"""

from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.mixers.contenders import PATCH, Backbone
from benchmarks.quality.mixers.curves import curves

SIDE = 32  # pixels a side of a photo
HELD_OUT = 5_000  # the last training photos, by which the learning rate is chosen
SIZES = (0.75, 1.0, 1.5, 2.0)  # times the training size
EVALUATION_BATCH = 100


# -- photos --


class Photos:
    """CIFAR-10 in memory: `pixels` uint8 (N,3,32,32) and `labels` (N,) of "train", "val" and "test"."""

    def __init__(self, splits: dict[str, tuple[Tensor, Tensor]]):
        self.splits = splits

    @classmethod
    def open(cls, folder: Path) -> "Photos":
        """From a folder of tables with splits train and test, as `gspn train` opens it."""
        from gspn.data.labelled import open_data

        splits = open_data(folder).splits
        missing = {"train", "test"} - set(splits)
        if missing:
            raise ValueError(f"{folder} has no split {', '.join(sorted(missing))}; expected CIFAR-10's train and test")
        pixels, labels = _decoded(splits["train"])
        return cls(
            {
                "train": (pixels[:-HELD_OUT], labels[:-HELD_OUT]),
                "val": (pixels[-HELD_OUT:], labels[-HELD_OUT:]),
                "test": _decoded(splits["test"]),
            }
        )

    def __getitem__(self, split: str) -> tuple[Tensor, Tensor]:
        return self.splits[split]


def _decoded(split) -> tuple[Tensor, Tensor]:
    pixels = np.stack([np.asarray(split.image(i).convert("RGB")) for i in range(len(split))])
    if pixels.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"expected photos of {SIDE}x{SIDE} pixels, got {pixels.shape[2]}x{pixels.shape[1]}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), split.labels


def normalized(pixels: Tensor) -> Tensor:
    """uint8 to float32 of mean 0 and deviation 1, nearly, over CIFAR-10."""
    return (pixels.float() / 255 - 0.47) / 0.25


def resized(x: Tensor, scale: float) -> Tensor:
    """Photos (B,3,H,W) at `scale` times their size, the sides a multiple of the patch."""
    if scale == 1:
        return x
    size = [PATCH * round(n * scale / PATCH) for n in x.shape[-2:]]
    return F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)


def _draws(seed: int, *what: int) -> torch.Generator:
    """A source of random numbers that depends on the seed and on what they are for."""
    numbers = np.random.SeedSequence([seed, *what]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(numbers[0] >> 1))


def _flipped(pixels: Tensor, source: torch.Generator) -> Tensor:
    """Each image mirrored with probability 1/2."""
    mirrored = torch.rand(len(pixels), 1, 1, 1, generator=source) < 0.5
    return torch.where(mirrored, pixels.flip(-1), pixels)


# -- tasks --


class Task:
    """What the tasks share. `settings` names what a trained model is tested at, `usual` is as in training.

    A task gives batches of training data, (inputs of the model..., target); the loss of a batch; and sums of what is
    measured over a batch, which are divided by the number of answers.
    """

    name: str
    about: str  # what a reader of the tables has to know
    outputs: int
    pooled: bool
    settings: tuple[str, ...] = tuple(f"{scale:g}" for scale in SIZES)
    usual = "1"
    better = "accuracy"  # what the tables show

    def __init__(self, photos: Photos):
        self.photos = photos

    def batches(self, seed: int, steps: int, size: int):
        """`steps` batches of `size`; photos come in a random order, each once before any comes again."""
        count = len(self.photos["train"][0])
        order = _draws(seed, 0)
        rest = torch.empty(0, dtype=torch.int64)
        for step in range(steps):
            while len(rest) < size:
                rest = torch.cat([rest, torch.randperm(count, generator=order)])
            index, rest = rest[:size], rest[size:]
            yield self.training_batch(index, _draws(seed, 1, step))

    def training_batch(self, index: Tensor, source: torch.Generator) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def test_batches(self, split: str, setting: str, count: int):
        """The same `count` examples every time."""
        raise NotImplementedError

    def loss(self, model: Backbone, batch: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError

    def sums(self, model: Backbone, batch: tuple[Tensor, ...]) -> tuple[dict[str, float], int]:
        """(sums over the batch's answers, how many answers)."""
        raise NotImplementedError

    def measure(self, model: Backbone, split: str, setting: str, count: int) -> dict[str, float]:
        """Means over `count` examples of `split`."""
        model.eval()
        totals, answers = {}, 0
        with torch.no_grad():
            for batch in self.test_batches(split, setting, count):
                sums, n = self.sums(model, batch)
                totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
                answers += n
        model.train()
        return {name: value / answers for name, value in totals.items()} | {"examples": count}


class _Labelled(Task):
    """Tasks whose answer is one of a few."""

    pooled = True
    smoothing = 0.0

    def loss(self, model, batch):
        x, labels = batch
        return F.cross_entropy(model(x), labels, label_smoothing=self.smoothing)

    def sums(self, model, batch):
        x, labels = batch
        logits = model(x)
        right = (logits.argmax(1) == labels).sum().item()
        return {"loss": F.cross_entropy(logits, labels, reduction="sum").item(), "accuracy": right}, len(labels)


class Classes(_Labelled):
    """CIFAR-10's classes; training photos are mirrored at random. Chance: 10%."""

    name, outputs, smoothing = "classes", 10, 0.1
    about = (
        "CIFAR-10's classes, 16x16 tokens. Chance is 10%. Settings are sizes of the photo, as multiples of 32 pixels."
    )

    def training_batch(self, index, source):
        pixels, labels = self.photos["train"]
        return normalized(_flipped(pixels[index], source)), labels[index]

    def test_batches(self, split, setting, count):
        pixels, labels = (part[:count] for part in self.photos[split])
        for x, y in zip(pixels.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
            yield resized(normalized(x), float(setting)), y


class Filling(Task):
    """Hidden parts of a photo from the rest: patches of 4x4 pixels (2x2 tokens) are hidden with probability 1/2, and
    the loss is the mean squared error over hidden pixels, in units of the normalised photos (1 is about the variance).

    A model that mixes nothing sees only that a token is hidden, so the best that it can do is the mean colour.
    """

    name, outputs, pooled, better = "filling", 3 * PATCH**2, False, "mse"
    about = (
        "Hidden patches of 4x4 pixels, half of the photo, from the rest: mean squared error, of which 1 is about the "
        "photos' variance. Settings are sizes of the photo, as multiples of 32 pixels."
    )
    HIDDEN = 0.5

    def _example(self, x: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, height, width = x.shape
        rows, columns = -(-height // (2 * PATCH)), -(-width // (2 * PATCH))
        coarse = torch.rand(batch, rows, columns, generator=source) < self.HIDDEN
        coarse[:, 0, 0] |= ~coarse.flatten(1).any(1)
        hidden = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : height // PATCH, : width // PATCH]
        return x, hidden, F.pixel_unshuffle(x, PATCH).permute(0, 2, 3, 1)

    def training_batch(self, index, source):
        return self._example(normalized(_flipped(self.photos["train"][0][index], source)), source)

    def test_batches(self, split, setting, count):
        for i, x in enumerate(self.photos[split][0][:count].split(EVALUATION_BATCH)):
            yield self._example(resized(normalized(x), float(setting)), _draws(i, 2))

    def loss(self, model, batch):
        x, hidden, target = batch
        return F.mse_loss(model(x, hidden)[hidden], target[hidden])

    def sums(self, model, batch):
        x, hidden, target = batch
        answers = hidden.sum().item() * self.outputs
        error = F.mse_loss(model(x, hidden)[hidden], target[hidden], reduction="sum").item()
        return {"loss": error, "mse": error}, answers


class Far(_Labelled):
    """Do the two ends of a long canvas come from one photo?

    The canvas is a strip of 8 x (distance + 8) tokens. Its left end is the upper left quarter of a photo, its right
    end the upper right quarter of the same photo (label 1) or of another one (label 0); everything between is white
    noise of the photos' mean and deviation. `distance` is that between the same places of both ends: at 8 the quarters
    lie side by side, as in the photo. Each training batch has one distance, drawn from DISTANCES; "mixed" goes through
    them in turn. A model is also tested at distances that it has not seen, 1.5 and 2 times the largest.

    Chance: 50%. Neither end alone says anything, because both come from the same photos under either label. What is
    left is to compare the ends. A bag of patches, whose answer is a sum over tokens and a threshold, can tell at most
    62.5%, however well it knows the photos: with scores g(left) + g(right) > t it wins P(2g > t) - P(g + g' > t) <= p -
    p^2 for p = P(g > t/2). Cross-entropy drives it nearer to 50%. The mixer `none` is that bag. Of what a comparison
    can find, mean colours give about 83% and the edges that would touch 97% (gradient boosting on such features).
    """

    name, outputs = "far", 2
    about = (
        "Do both ends of a strip come from one photo? Chance is 50%, and a bag of patches reaches 62.5% at most. "
        "Settings are the distances of the ends in tokens; `mixed` is the mean over 8 to 64, which are trained on."
    )
    DISTANCES = (8, 16, 32, 64)
    settings, usual = ("mixed", "8", "16", "32", "64", "96", "128"), "mixed"
    END = SIDE // 2  # pixels a side of an end

    def canvas(self, left: Tensor, right: Tensor, distance: int, source: torch.Generator) -> Tensor:
        """The strip for ends (B,3,16,16), which are normalised."""
        between = torch.randn(len(left), 3, self.END, distance * PATCH - self.END, generator=source)
        return torch.cat([left, between, right], -1)

    def example(self, pixels: Tensor, distance: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Canvases and labels from photos (B,3,32,32), B even: as many of each label, in a random order."""
        x = normalized(pixels)[:, :, : self.END]
        left, right = x[..., : self.END], x[..., self.END :]
        shuffled = torch.randperm(len(x), generator=source)
        apart, same = shuffled.chunk(2)
        partner = torch.arange(len(x))
        partner[apart] = apart.roll(1)
        labels = torch.zeros(len(x), dtype=torch.int64)
        labels[same] = 1
        return self.canvas(left, right[partner], distance, source), labels

    def training_batch(self, index, source):
        distance = self.DISTANCES[torch.randint(len(self.DISTANCES), (), generator=source)]
        return self.example(_flipped(self.photos["train"][0][index], source), distance, source)

    def test_batches(self, split, setting, count):
        for i, pixels in enumerate(self.photos[split][0][:count].split(EVALUATION_BATCH)):
            distance = self.DISTANCES[i % len(self.DISTANCES)] if setting == "mixed" else int(setting)
            yield self.example(pixels, distance, _draws(i, 3))


@cache
def _pairs(split: str, side: int, count: int) -> Tensor:
    """`count` pairs of curves, as pixels: int64 (count, 2, length, 2). Each split has its own."""
    numbers = np.random.default_rng([("train", "val", "test").index(split), side])
    length = round(Tracing.LENGTH * side)
    return torch.from_numpy(np.stack([np.floor(curves(2, length, side, numbers)) for _ in range(count)])).long()


class Tracing(Task):
    """Which tokens on two curves are on the one with the red dot?

    Two white curves, a pixel wide, lie over a photo of half the contrast. One begins with a red dot, the other with a
    blue one. They keep apart, and both are as long. For each token on a curve the answer is whether this curve begins
    with the red dot. Chance: 50%, for either dot is red as often. A white pixel tells nothing by itself: one has to
    follow its curve to the dot. A human is always right. Measured on tokens that are at least NEAR pixels along the
    curve from its dot; trained on all but the dot's.

    What a mixer has to do is to carry the dot's colour along a path that the input alone shows. A mean over
    surroundings, however far, mixes both colours.
    """

    name, outputs, pooled = "tracing", 2, False
    about = (
        "Which tokens on two curves over a photo are on the one with the red dot? Asked of each token on a curve, 8 or "
        "more pixels along it from the dot. Chance is 50%. Settings are sizes of the canvas, as multiples of 32 "
        "pixels; on a larger one the curves are as much longer."
    )
    LENGTH = 0.9  # of a curve, in sides of the canvas
    NEAR = 8  # pixels
    PAIRS = MappingProxyType({"train": 2048, "val": 256, "test": 256})  # used turned, mirrored, with either dot red
    DOTS = ((2.0, -1.0, -1.0), (-1.0, -1.0, 2.0))  # red and blue, as normalised pixels
    WHITE = 2.0
    IGNORED = -100

    def example(self, x: Tensor, split: str, index: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Canvases from normalised photos (B,3,H,H); for each token 1 on the curve with the red dot, 0 on the other,
        IGNORED elsewhere; and the pixels along the curve from its dot (the least in a token)."""
        side, x = x.shape[-1], x / 2
        pairs = _pairs(split, side, self.PAIRS[split])
        pairs = pairs[index % len(pairs)]
        transpose, mirror, swap = (torch.rand(len(x), 3, generator=source) < 0.5).T
        flips = torch.rand(len(x), 1, 1, generator=source) < 0.5
        pairs = torch.where(transpose[:, None, None, None], pairs.flip(-1), pairs)
        rows = torch.where(flips, side - 1 - pairs[..., 0], pairs[..., 0])
        columns = torch.where(mirror[:, None, None], side - 1 - pairs[..., 1], pairs[..., 1])
        batch, length = torch.arange(len(x))[:, None, None], torch.arange(rows.shape[2])
        x.permute(0, 2, 3, 1)[batch, rows, columns] = self.WHITE
        labels = torch.full((len(x), side // PATCH, side // PATCH), self.IGNORED)
        along = torch.full_like(labels, side * side)
        for which in (0, 1):
            red = (swap == bool(which)).long()
            at = batch[..., 0], rows[:, which] // PATCH, columns[:, which] // PATCH
            labels[at] = red[:, None].expand(-1, len(length))
            along.view(-1).scatter_reduce_(
                0,
                ((at[0] * labels.shape[1] + at[1]) * labels.shape[2] + at[2]).flatten(),
                length.repeat(len(x)),
                "amin",
            )
            colours = x.new_tensor(self.DOTS)[1 - red]
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    x[batch[:, 0, 0], :, rows[:, which, 0] + down, columns[:, which, 0] + right] = colours
        return x, labels.where(along > 2, self.IGNORED), along

    def training_batch(self, index, source):
        return self.example(normalized(_flipped(self.photos["train"][0][index], source)), "train", index, source)

    def test_batches(self, split, setting, count):
        for i, x in enumerate(self.photos[split][0][:count].split(EVALUATION_BATCH)):
            index = torch.arange(len(x)) + i * EVALUATION_BATCH
            yield self.example(resized(normalized(x), float(setting)), split, index, _draws(i, 4))

    def loss(self, model, batch):
        x, labels, _ = batch
        return F.cross_entropy(model(x).flatten(0, 2), labels.flatten(), ignore_index=self.IGNORED)

    def sums(self, model, batch):
        x, labels, along = batch
        asked = (labels != self.IGNORED) & (along >= self.NEAR)
        logits, labels = model(x)[asked], labels[asked]
        right = (logits.argmax(1) == labels).sum().item()
        return {"loss": F.cross_entropy(logits, labels, reduction="sum").item(), "accuracy": right}, len(labels)


TASKS = {task.name: task for task in (Classes, Far, Filling, Tracing)}
