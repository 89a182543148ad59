"""How many images a second the loader reads, alone and in training, by kind of data and augmentation.

    python -m benchmarks.speed.loader --out benchmarks/results/speed/loader-cpu.json [--images 256] [--workers 0 2] \\
        [--train gspn_tiny]

The images are JPEG files of 500x375 pixels, the mean size of ImageNet's, cut from scikit-learn's two photographs.
Without workers the clock is the CPU time of this process, which other processes disturb little: images/s of one core.
With workers it is wall time, which is meaningful only on an idle machine. The published recipe needs timm; without timm
that row is omitted. `gspn train` reports at its end how long a training waited for images.
"""

import argparse
import io
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import gspn
from benchmarks.harness import harness
from gspn.data.augment import Augmentation, timm_problem
from gspn.data.images import Preprocessing
from gspn.data.labelled import open_data
from gspn.data.loader import make_loader

SIZE, BATCH, TRAIN_BATCH, ROUNDS = 224, 32, 4, 3
PREPROCESSING = Preprocessing(3, (SIZE, SIZE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop=0.875)
AUGMENTATIONS = {
    "centre crop (evaluation)": None,
    "random crop, flip": Augmentation(crop=True, crop_area=0.08, flip=True),
    "random crop, flip, erasing": Augmentation(crop=True, crop_area=0.08, flip=True, erase=0.25),
}
RECIPE = dict(crop=True, crop_area=0.08, flip=True, erase=0.25, rand_augment="m9-mstd0.5-inc1")


def write_photos(root: Path, count: int) -> dict[str, Path]:
    """Writes the same photos, of ten classes, as a folder, four shards and a parquet file; gives their paths."""
    import datasets
    from sklearn.datasets import load_sample_images

    datasets.disable_progress_bars()
    photos, random = load_sample_images().images, np.random.RandomState(0)
    rows = {"image": [], "label": []}
    for i in range(count):
        height, width, _ = photos[i % 2].shape
        top, left = random.randint(height - 375 + 1), random.randint(width - 500 + 1)
        file = io.BytesIO()
        Image.fromarray(photos[i % 2][top : top + 375, left : left + 500]).save(file, "JPEG", quality=90)
        rows["image"].append({"bytes": file.getvalue(), "path": None})
        rows["label"].append(i % 10)
    for i, (image, label) in enumerate(zip(*rows.values(), strict=True)):
        (root / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        (root / "folder" / str(label) / f"{i:05}.jpg").write_bytes(image["bytes"])
    (root / "shards").mkdir()
    for shard in range(4):
        with tarfile.open(root / "shards" / f"{shard}.tar", "w") as tar:
            for i in range(shard, count, 4):
                for name, content in ((f"{i:05}.jpg", rows["image"][i]["bytes"]), (f"{i:05}.cls", b"%d" % (i % 10))):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    (root / "parquet").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "parquet" / f"{split}.parquet")
    return {name: root / name for name in ("folder", "shards", "parquet")}


def rate(split, augmentation, workers):
    """Images a second: the median of ROUNDS epochs, after a first one that starts the workers."""
    train = augmentation is not None
    loader = make_loader(split, PREPROCESSING, BATCH, train=train, augmentation=augmentation, workers=workers)
    clock, seconds = time.process_time if workers == 0 else time.perf_counter, []
    for epoch in range(ROUNDS + 1):
        loader.begin(epoch)
        start = clock()
        images = sum(len(batch["label"]) for batch in loader)
        seconds.append(clock() - start)
    return round(images / float(np.median(seconds[1:])), 1)


def training(name):
    """Images a second that one core trains: forward and backward, without the loader."""
    model = gspn.create_model(name, num_classes=1000).to(memory_format=torch.channels_last)
    x = torch.randn(TRAIN_BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)

    def step():
        model(x).square().mean().backward()

    torch.set_num_threads(1)
    (samples,) = harness.interleaved({name: step}, ROUNDS, threads=1).values()
    return round(TRAIN_BATCH / float(np.median(samples)), 2)


def table(result):
    """The figures as Markdown."""
    where = result["environment"]
    lines = [
        f"Machine: {where['cpu']}, {where['cores']} cores; torch {where['torch']}; commit {where['commit'][:12]}; "
        f"{where['date']}. 500x375 JPEG to {SIZE}x{SIZE}. Without workers: images/s of one core's CPU time.",
        "",
    ]
    rows = [
        [row["data"], row["augmentation"], row["workers"], f"{row['images_per_second']:.0f}"]
        for row in result["loader"]
    ]
    lines.append(harness.table(["data", "augmentation", "workers", "images/s"], rows))
    for name, rate in result.get("training", {}).items():
        slowest = min(row["images_per_second"] for row in result["loader"] if row["workers"] == 0)
        part = 1 / slowest / (1 / slowest + 1 / rate)
        lines += [
            "",
            f"One core trains {rate} images/s of `{name}` (forward and backward at {SIZE}x{SIZE}): at the slowest",
        ]
        lines[-1] += f" of these the loader takes {part:.1%} of a core's time in training."
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--train", metavar="MODEL", nargs="+", default=[], help="models whose training is timed too")
    arguments = parser.parse_args()

    augmentations = dict(AUGMENTATIONS)
    if timm_problem() is None:
        augmentations["published recipe (RandAugment by timm)"] = Augmentation(**RECIPE)
    result = {"environment": harness.environment(), "images": arguments.images, "size": SIZE, "loader": []}
    with tempfile.TemporaryDirectory() as root:
        folders = write_photos(Path(root), arguments.images)
        datas = {name: open_data(path) for name, path in folders.items()}
        splits = {name: data.splits.get("all") or data.splits["train"] for name, data in datas.items()}
        splits["parquet, streaming"] = open_data(folders["parquet"], streaming=True).splits["train"]
        cases = [("folder", name) for name in augmentations]
        cases += [(name, "random crop, flip") for name in splits if name != "folder"]
        for workers in arguments.workers:
            for data, augmentation in cases:
                images = rate(splits[data], augmentations[augmentation], workers)
                row = {"data": data, "augmentation": augmentation, "workers": workers, "images_per_second": images}
                result["loader"].append(row)
                print(row, flush=True)
    result["training"] = {name: training(name) for name in arguments.train}
    harness.write_json(arguments.out, result, quiet=True)
    arguments.out.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
