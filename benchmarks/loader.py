"""How many images a second the loader reads, alone and in training: folders, shards, tables, streams; augmentations.

python -m benchmarks.loader --out benchmarks/results/loader-cpu.json [--images 256] [--workers 0 2] [--train gspn_micro]

The images are JPEG files of 500x375 pixels, the mean size of ImageNet's, cut from scikit-learn's two photographs. With
no workers the clock is the CPU time of this process, which other processes disturb little: images/s of one core. With
workers it is wall time, which says something on an idle machine only. Training is an epoch of a model, and says which
part of the time it waits for images. The published recipe needs timm; without it that row is left out.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import harness
from gspn.train.classify import train_classifier
from gspn.train.data import open_data
from gspn.train.images import Preprocessing
from gspn.train.loader import make_loader
from gspn.train.options import Options
from gspn.train.recipe import Augmentation, timm_problem

SIZE, BATCH, ROUNDS = 224, 32, 3
PREPROCESSING = Preprocessing(3, (SIZE, SIZE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop=0.875)
AUGMENTATIONS = {
    "centre crop (evaluation)": None,
    "random crop, flip": Augmentation(crop=True, crop_area=0.08, flip=True),
    "random crop, flip, erasing": Augmentation(crop=True, crop_area=0.08, flip=True, erase=0.25),
}
RECIPE = dict(crop=True, crop_area=0.08, flip=True, erase=0.25, rand_augment="m9-mstd0.5-inc1")


def write_photos(root: Path, count: int) -> dict[str, Path]:
    """The same photos, of ten classes, as a folder, four shards and a parquet file: where each of them lies."""
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
    """Images a second: the median of some epochs after a first one that starts the workers."""
    train = augmentation is not None
    loader = make_loader(split, PREPROCESSING, BATCH, train=train, augmentation=augmentation, workers=workers)
    clock, seconds = time.process_time if workers == 0 else time.perf_counter, []
    for epoch in range(ROUNDS + 1):
        loader.begin(epoch)
        start = clock()
        images = sum(len(batch["label"]) for batch in loader)
        seconds.append(clock() - start)
    return round(images / float(np.median(seconds[1:])), 1)


def training(folder, model, workers, root):
    """What a run says of itself: images a second, and the part of the time in which it waits for images."""
    options = Options(
        model=model, epochs=1, batch_size=BATCH, preset="photos", rand_augment="none", mixup=0.0, cutmix=0.0,
        color_jitter=0.0, size=(SIZE, SIZE), workers=workers,
    )  # fmt: skip
    run, _, _ = train_classifier(folder, root / "run", options, overwrite=True)
    row = run.metrics[-1]
    waiting = round(row["data_seconds"] / row["seconds"], 4)
    return {"model": model, "workers": workers, "images_per_second": row["images_per_second"], "waiting": waiting}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--train", metavar="MODEL", help="also an epoch of training with this model")
    arguments = parser.parse_args()

    augmentations = dict(AUGMENTATIONS)
    if timm_problem() is None:
        augmentations["published recipe (RandAugment by timm)"] = Augmentation(**RECIPE)
    result = {"environment": harness.environment(), "images": arguments.images, "size": SIZE, "loader": []}
    with tempfile.TemporaryDirectory() as root:
        places = write_photos(Path(root), arguments.images)
        datas = {name: open_data(path) for name, path in places.items()}
        splits = {name: data.splits.get("all") or data.splits["train"] for name, data in datas.items()}
        splits["parquet, streaming"] = open_data(places["parquet"], streaming=True).splits["train"]
        cases = [("folder", name) for name in augmentations]
        cases += [(name, "random crop, flip") for name in splits if name != "folder"]
        for workers in arguments.workers:
            for data, augmentation in cases:
                images = rate(splits[data], augmentations[augmentation], workers)
                row = {"data": data, "augmentation": augmentation, "workers": workers, "images_per_second": images}
                result["loader"].append(row)
                print(row, flush=True)
        if arguments.train:
            result["training"] = training(places["folder"], arguments.train, max(arguments.workers), Path(root))
            print(result["training"])
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
