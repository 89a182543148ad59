"""What DATA means, in all its kinds and with all its faults; preprocessing, augmentation, order."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from gspn.data.augment import Augmentation
from gspn.data.idx import read_idx
from gspn.data.images import TOGETHER, UNREADABLE, Preprocessing, Split, generator, with_channels
from gspn.data.labelled import DataError, open_data
from gspn.data.loader import ImageDataset, make_loader
from gspn.data.sources import hold_out

GREY8 = Preprocessing(1, (8, 8), (0.5,), (0.25,))


def write_images(folder, count, size=(8, 8), mode="L", start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        Image.new(mode, size, i * 7 % 255 if mode == "L" else (i * 7 % 255, 10, 200)).save(folder / f"{i:03}.png")


def write_idx(path, array, magic=None):
    content = (magic or bytes([0, 0, 8, array.ndim])) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_idx_folder(path, train=40, test=20, suffix=".gz", dot="-"):
    path.mkdir(exist_ok=True)
    for name, count in (("train", train), ("t10k", test)):
        images = np.random.RandomState(count).randint(0, 255, (count, 12, 10), np.uint8)
        write_idx(path / f"{name}-images{dot}idx3-ubyte{suffix}", images)
        write_idx(path / f"{name}-labels{dot}idx1-ubyte{suffix}", (np.arange(count) % 4).astype(np.uint8))
    return path


# -- digits --


def test_digits_are_the_real_ones_with_a_fixed_stratified_split():
    from sklearn.datasets import load_digits

    data = open_data("digits")
    train, test, name = data.for_training()
    assert (len(train), len(test), name) == (1438, 359, "test")
    assert train.pixels.shape == (1438, 1, 8, 8) and train.pixels.dtype == torch.uint8
    together = torch.cat([train.pixels, test.pixels]).double() * (16 / 255)
    assert torch.allclose(together.mean(), torch.tensor(load_digits().images.mean()), atol=0.01)
    assert torch.equal((together.round() * (255 / 16)).round().byte(), torch.cat([train.pixels, test.pixels]))
    share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
    assert (share - 0.2).abs().max() < 0.01
    assert test.labels[:8].tolist() == open_data("digits").splits["test"].labels[:8].tolist()
    assert train.class_names == [str(i) for i in range(10)]


def test_digits_beside_a_folder_of_that_name_is_ambiguous(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "digits" / "a", 3)
    with pytest.raises(DataError, match=r"\./digits"):
        open_data("digits")
    assert open_data("./digits").kind == "folder"


def test_hold_out_is_stratified_and_leaves_every_class_an_image():
    labels = [0] * 50 + [1] * 20 + [2] * 2 + [3]
    rest, held = hold_out(labels, 0.1)
    assert np.bincount(np.asarray(labels)[held], minlength=4).tolist() == [5, 2, 1, 0]
    assert sorted([*rest, *held]) == list(range(73))
    assert (hold_out(labels, 0.1)[1] == held).all()


def test_two_classes_of_one_name(tmp_path):
    with pytest.raises(DataError, match="same name: a"):
        open_data("digits", class_names=["a", "a", *"bcdefghi"])
    write_idx_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("shoe\nbag\nshoe\nbag\n")
    with pytest.raises(DataError, match="the same name: bag, shoe"):
        open_data(tmp_path)


# -- folders --


def test_folder_of_classes_is_split_the_same_way_each_time(tmp_path):
    write_images(tmp_path / "cat", 20)
    write_images(tmp_path / "dog", 10, mode="RGB")
    data = open_data(tmp_path, val_fraction=0.2)
    train, val, name = data.for_training()
    assert (len(train), len(val), name, train.class_names) == (24, 6, "val", ["cat", "dog"])
    assert [val.names(i) for i in range(6)] == [
        open_data(tmp_path, val_fraction=0.2).splits["val"].names(i) for i in range(6)
    ]
    assert "held out" in data.notes[0]
    assert val.channels() == 3  # a colour image among them
    # only a run that was trained on these data is evaluated on the part held out
    assert data.for_evaluation(trained_on=data.where)[1] == "val"
    assert data.for_evaluation(trained_on="elsewhere")[1] == "all"
    assert len(data.for_evaluation("train")[0]) == 24


def test_training_images_never_stand_in_for_an_evaluation_split(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 1)
    data = open_data(tmp_path)
    assert data.splits.keys() == {"train", "all"}
    for refused in (data.for_training, lambda: data.for_evaluation(trained_on=data.where)):
        with pytest.raises(DataError, match=r"no evaluation split, .* 2 images"):
            refused()
    assert data.for_evaluation(trained_on="elsewhere")[1] == "all"


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_folder_with_splits(tmp_path, name):
    write_images(tmp_path / "train" / "cat", 4)
    write_images(tmp_path / "train" / "dog", 4)
    write_images(tmp_path / name / "dog", 3)
    train, evaluation, _ = open_data(tmp_path).for_training()
    assert len(train) == 8 and len(evaluation) == 3
    assert evaluation.relabelled(train.class_names).labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "classes, problem", [(("train", "bus"), "train folder"), (("training", "testing"), "parts of")]
)
def test_classes_called_like_splits_work_where_the_message_says(tmp_path, classes, problem):
    for name in classes:
        write_images(tmp_path / "photos" / name, 4)
    with pytest.raises(DataError, match=f"{problem}.* {tmp_path}/photos/train/CLASS/IMAGE"):
        open_data(tmp_path / "photos")
    (tmp_path / "photos").rename(tmp_path / "classes")
    (tmp_path / "photos").mkdir()
    (tmp_path / "classes").rename(tmp_path / "photos" / "train")
    train, _, _ = open_data(tmp_path / "photos").for_training()
    assert train.class_names == sorted(classes) and len(train) == 6


def test_folder_faults(tmp_path):
    with pytest.raises(DataError, match=r"holds nothing.*`digits`"):
        open_data(tmp_path)
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(DataError, match=r"1 other thing: notes\.doc"):
        open_data(tmp_path)
    write_images(tmp_path / "train" / "cat", 4)
    write_images(tmp_path / "dogs", 4)
    with pytest.raises(DataError, match=r"train folder .*1 folder: dogs"):
        open_data(tmp_path)
    with pytest.raises(DataError, match="no /nowhere/at/all"):
        open_data("/nowhere/at/all")
    with pytest.raises(DataError, match="unknown kind"):
        open_data(tmp_path / "notes.doc")
    with pytest.raises(DataError, match=r"val_fraction .* got 2"):
        open_data("digits", val_fraction=2)


def test_folder_with_an_empty_class_or_two_validation_folders(tmp_path):
    write_images(tmp_path / "cat", 4)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog .*no images"):
        open_data(tmp_path)
    for name in ("train", "val", "valid"):
        write_images(tmp_path / "splits" / name / "cat", 2)
    with pytest.raises(DataError, match="one split"):
        open_data(tmp_path / "splits")


def test_files_that_are_no_images_are_ignored_and_told(tmp_path):
    write_images(tmp_path / "cat", 4)
    (tmp_path / "cat" / "readme.txt").write_text("x")
    assert any("readme.txt" in note for note in open_data(tmp_path).notes)


def test_classes_unknown_and_missing(tmp_path):
    write_images(tmp_path / "emu", 2)
    write_images(tmp_path / "cat", 2)
    split, _ = open_data(tmp_path).for_evaluation()
    with pytest.raises(DataError, match=r"1 class: emu .*cat, dog"):
        split.relabelled(["cat", "dog"])


# -- idx --


@pytest.mark.parametrize(("suffix", "dot"), [(".gz", "-"), ("", "-"), ("", ".")])
def test_idx_files(tmp_path, suffix, dot):
    train, test, name = open_data(write_idx_folder(tmp_path, suffix=suffix, dot=dot)).for_training()
    assert train.pixels.shape == (40, 1, 12, 10) and len(test) == 20 and name == "test"
    assert train.labels[:5].tolist() == [0, 1, 2, 3, 0] and train.class_names is None
    assert train.image(0).size == (10, 12)


def test_idx_class_names(tmp_path):
    write_idx_folder(tmp_path)
    assert open_data(tmp_path, class_names=list("abcd")).splits["train"].class_names == list("abcd")
    (tmp_path / "classes.txt").write_text("shirt\nshoe\nbag\ncoat\n")
    assert open_data(tmp_path).splits["test"].class_names == ["shirt", "shoe", "bag", "coat"]
    (tmp_path / "classes.txt").write_text("shirt\nshoe\n")
    with pytest.raises(DataError, match=r"2 classes.* 3"):
        open_data(tmp_path)


def test_idx_without_test_files_holds_out(tmp_path):
    write_idx_folder(tmp_path)
    for file in tmp_path.glob("t10k*"):
        file.unlink()
    assert len(open_data(tmp_path, val_fraction=0.25).splits["val"]) == 8  # of 10 in each of 4 classes, 2


def test_idx_faults(tmp_path):
    file = tmp_path / "train-images-idx3-ubyte"
    images = np.zeros((3, 4, 4), np.uint8)
    write_idx(file, images, magic=b"\x00\x00\x0d\x03")
    with pytest.raises(DataError, match=r"00 00 0d 03.*00 00 08 03"):
        read_idx(file, 3)
    write_idx(file, images)
    with pytest.raises(DataError, match="expected 00 00 08 01"):
        read_idx(file, 1)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"truncated.*3 x 4 x 4 .* 43"):
        read_idx(file, 3)
    file.write_bytes(b"\x00\x00\x08\x03\x00")
    with pytest.raises(DataError, match="header"):
        read_idx(file, 3)
    write_idx(file, np.zeros((0, 4, 4), np.uint8))
    with pytest.raises(DataError, match="empty"):
        read_idx(file, 3)
    packed = tmp_path / "train-labels-idx1-ubyte.gz"
    write_idx(packed, np.zeros(300, np.uint8))
    packed.write_bytes(packed.read_bytes()[:20])
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(packed, 1)


def test_idx_folder_faults(tmp_path):
    write_idx_folder(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(19, np.uint8))
    with pytest.raises(DataError, match=r"20 images.*t10k-labels-idx1-ubyte\.gz.* 19 "):
        open_data(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="not the test labels"):
        open_data(tmp_path)
    write_images(tmp_path / "cat", 1)
    with pytest.raises(DataError, match="idx files and class folders"):
        open_data(tmp_path)


# -- Hugging Face datasets --


@pytest.fixture
def table(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [Image.fromarray(np.full((9, 9), i * 10, np.uint8)) for i in range(12)]
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["lo", "hi"])})
    return datasets.Dataset.from_dict({"img": images, "kind": [i % 2 for i in range(12)]}, features=features)


def test_dataset_saved_to_disk(table, tmp_path):
    import datasets

    splits = datasets.DatasetDict({"train": table, "validation": table.select(range(4)), "extra": table})
    splits.save_to_disk(tmp_path / "saved")
    train, val, name = open_data(tmp_path / "saved").for_training()
    assert (len(train), len(val), name, train.class_names) == (12, 4, "val", ["lo", "hi"])
    assert train.image(3).getpixel((0, 0)) == 30 and train.channels() == 1
    table.save_to_disk(tmp_path / "alone")
    assert set(open_data(tmp_path / "alone").splits) == {"train", "val", "all"}


def test_dataset_from_parquet_and_its_columns(table, tmp_path):
    table = table.add_column("text", [f"word {i % 3}" for i in range(12)])
    (tmp_path / "tables").mkdir()
    table.to_parquet(tmp_path / "tables" / "train.parquet")
    file = open_data(tmp_path / "tables" / "train.parquet", label_column="text")
    assert file.splits["all"].class_names == ["word 0", "word 1", "word 2"]
    assert open_data(tmp_path / "tables").splits["all"].class_names == ["lo", "hi"]
    with pytest.raises(DataError, match=r"column 'colour'.*img, kind, text"):
        open_data(tmp_path / "tables", image_column="colour")
    with pytest.raises(DataError, match="holds no images"):
        open_data(tmp_path / "tables", image_column="kind")


def test_dataset_without_labels_or_with_another_split(table, tmp_path):
    import datasets

    table.remove_columns("kind").save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(DataError, match=r"ClassLabel.*--label-column.*img \(Image\)"):
        open_data(tmp_path / "unlabelled")
    datasets.DatasetDict({"part1": table}).save_to_disk(tmp_path / "strange")
    with pytest.raises(DataError, match=r"part1.*train"):
        open_data(tmp_path / "strange")


def test_a_row_without_an_image_is_told_as_such(table, tmp_path):
    import datasets

    columns = {"img": [*table["img"], None], "kind": [*table["kind"], 0]}
    datasets.Dataset.from_dict(columns, features=table.features).save_to_disk(tmp_path / "saved")
    split = open_data(tmp_path / "saved").splits["all"]
    assert split.problem(len(table)).endswith(f"row {len(table)}: the row has no image")


def test_names_that_are_nearly_right(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    tried = []
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, **_: tried.append(url))
    for name in ("digts", "digit", "Digits"):
        with pytest.raises(DataError, match=f"{name}: .*digits"):
            open_data(name)
    assert tried == []
    write_images(tmp_path / "photos" / "cat", 1)
    with pytest.raises(DataError, match=r"phtos \(.*photos\?\)"):
        open_data(tmp_path / "phtos")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"link to .*gone"):
        open_data(tmp_path / "link")


# -- preprocessing --


def test_any_image_becomes_the_models_input(tmp_path):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert torch.equal(GREY8(grey)[0], torch.arange(64, dtype=torch.uint8).view(8, 8))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert with_channels(clear, 1).getpixel((0, 0)) == 255  # transparent is white
    palette = grey.convert("P")
    palette.info["transparency"] = 0
    assert GREY8(palette).shape == (1, 8, 8)
    deep = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    assert with_channels(deep, 1).getpixel((0, 0)) == 255
    with pytest.raises(ValueError, match="floating-point"):
        with_channels(Image.new("F", (8, 8)), 1)
    colour = Preprocessing(3, (4, 6), (0, 0, 0), (1, 1, 1), crop=0.875)
    assert colour(Image.new("L", (301, 77), 9)).shape == (3, 4, 6)
    assert Preprocessing(**colour.to_json()) == colour


def test_exif_orientation_is_obeyed_once(tmp_path):
    from gspn.data.images import decode, upright

    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    turned = decode(tmp_path / "turned.jpg")
    assert turned.size == upright(turned).size == (10, 20)


def test_centre_crop_keeps_the_middle():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 255
    pixels = Preprocessing(3, (16, 16), (0,) * 3, (1,) * 3)(Image.fromarray(image))
    assert (pixels[:, :, 1:-1] == 255).all() and (pixels > 200).all()  # bicubic sees the border's other side


def test_normalisation():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert GREY8.normalize(pixels).flatten().tolist() == [-2, 2]


# -- order and randomness --


def test_augmentation_belongs_to_seed_epoch_and_index():
    split = open_data("digits").splits["train"]
    augmentation = Augmentation(shift=2, fill="zero", flip=True)
    one, two = (ImageDataset(split, GREY8, augmentation, seed=3) for _ in range(2))
    batch = one.__getitems__([(4, i) for i in range(32)])
    other = two.__getitems__([(4, i) for i in reversed(range(64))])
    assert torch.equal(batch["image"], other["image"].flip(0)[:32])
    assert not torch.equal(batch["image"], one.__getitems__([(5, i) for i in range(32)])["image"])
    assert not torch.equal(
        batch["image"], ImageDataset(split, GREY8, augmentation, 4).__getitems__([(4, i) for i in range(32)])["image"]
    )


def test_order_belongs_to_seed_and_epoch():
    split = open_data("digits").splits["test"]

    def order(seed, epoch, batches_done=0):
        loader = make_loader(split, GREY8, 50, train=True, seed=seed)
        loader.begin(epoch, batches_done)
        return torch.cat([batch["index"] for batch in loader]).tolist()

    assert order(1, 2) == order(1, 2) and len(set(order(1, 2))) == len(order(1, 2)) == 350
    assert len({tuple(order(*key)) for key in [(1, 2), (2, 1), (1, 1), (2, 2)]}) == 4
    assert order(1, 2, batches_done=3) == order(1, 2)[150:]


def test_images_in_shards_are_shuffled_over_a_few_shards_at_a_time():
    shard = torch.arange(3000) // 100
    split = Split(torch.zeros(3000), ["a"], pixels=torch.zeros(3000, 1, 1, 1), shard=shard)
    order = [i for (i,) in split.keys(generator(0))]
    assert sorted(order) == list(range(3000)) and order == [i for (i,) in split.keys(generator(0))]
    first = order[: TOGETHER * 100]
    assert shard[first].unique().numel() == TOGETHER and shard[first[:100]].unique().numel() == TOGETHER
    assert order[:800] != [i for (i,) in split.keys(generator(1))][:800]
    part = split.subset(range(50, 150))
    assert (
        sorted(i for (i,) in part.keys(generator(0))) == list(range(100)) and part.shard.tolist() == [0] * 50 + [1] * 50
    )


def test_workers_change_nothing_and_unreadable_images_are_marked(tmp_path):
    write_images(tmp_path / "a", 10, size=(11, 9))
    write_images(tmp_path / "b", 10, size=(9, 12), start=10)
    (tmp_path / "b" / "015.png").write_bytes((tmp_path / "b" / "015.png").read_bytes()[:40])
    split, _ = open_data(tmp_path).for_evaluation()
    batches = []
    for workers in (0, 2):
        loader = make_loader(
            split, GREY8, 6, train=True, augmentation=Augmentation(crop=True, flip=True), seed=1, workers=workers
        )
        loader.begin(3)
        batches.append(list(loader))
    assert len(batches[0]) == 3  # the incomplete batch is left out in training
    for here, there in zip(*batches, strict=True):
        assert all(torch.equal(here[key], there[key]) for key in here)
    everything = list(make_loader(split, GREY8, 6))
    labels = torch.cat([batch["label"] for batch in everything])
    assert torch.where(labels == UNREADABLE)[0].tolist() == [15]
    assert "015.png" in split.problem(15)


def test_small_images_are_decoded_once(tmp_path, monkeypatch):
    """In several epochs of a training, where nothing but their order and the augmentation changes."""
    write_images(tmp_path / "a", 9, size=(11, 9))
    (tmp_path / "a" / "005.png").write_bytes((tmp_path / "a" / "005.png").read_bytes()[:40])
    split, _ = open_data(tmp_path).for_evaluation()
    common = dict(train=True, augmentation=Augmentation(shift=1, flip=True), seed=1)
    decoded, image = [], split.image
    monkeypatch.setattr(split, "image", lambda i: decoded.append(i) or image(i))

    def epochs(loader):
        for epoch in range(3):
            loader.begin(epoch)
            yield from loader

    kept = make_loader(split, GREY8, 3, workers=2, keep=True, **common)
    assert kept.num_workers == 0
    for here, there in zip(epochs(kept), epochs(make_loader(split, GREY8, 3, **common)), strict=True):
        assert all(torch.equal(here[key], there[key]) for key in here)
    others = [i for i in range(9) if i != 5]
    # the first shows whether images are small; a damaged one is tried again
    assert sorted(decoded) == sorted([0, *4 * others, *6 * [5]])
    for changed in (dict(augmentation=Augmentation(crop=True)), dict(augmentation=Augmentation(rand_augment="none"))):
        loader = make_loader(split, GREY8, 3, workers=2, keep=True, **common | changed)
        assert (loader.num_workers == 2) == loader.dataset.augmentation.crop
    write_images(tmp_path / "large" / "a", 1, size=(97, 9))
    large, _ = open_data(tmp_path / "large").for_evaluation()
    assert make_loader(large, GREY8, 3, workers=2, keep=True).num_workers == 2  # workers decode these faster
    monkeypatch.setattr("gspn.data.loader.KEPT", 9 * 64 - 1)
    assert make_loader(split, GREY8, 3, workers=2, keep=True).num_workers == 2


def test_kept_images_of_a_part_that_goes_on_within_an_epoch(tmp_path):
    write_images(tmp_path / "a", 9, size=(11, 9))
    whole, _ = open_data(tmp_path).for_evaluation()
    split = whole.subset([8, 3, 5, 1, 0])
    kept, again = (make_loader(split, GREY8, 2, train=True, seed=1, keep=keep) for keep in (True, False))
    for epoch, done in ((0, 0), (1, 1)):
        kept.begin(epoch, done), again.begin(epoch, done)
        for here, there in zip(kept, again, strict=True):
            assert all(torch.equal(here[key], there[key]) for key in here)
    assert kept.dataset.known.any()


def test_data_sets_can_be_sent_to_workers_that_are_not_forked(table, tmp_path):
    write_images(tmp_path / "images" / "a", 4)
    write_images(tmp_path / "images" / "b", 4, start=4)
    table.to_parquet(tmp_path / "train.parquet")
    for data in ("digits", tmp_path / "images", tmp_path / "train.parquet", write_idx_folder(tmp_path / "idx")):
        split = open_data(data).splits["train"].subset([1, 2])
        dataset = ImageDataset(split, GREY8)
        sent = pickle.loads(pickle.dumps(dataset))
        keys = [(0, 0), (0, 1)]
        assert torch.equal(sent.__getitems__(keys)["image"], dataset.__getitems__(keys)["image"])
        assert sent.split.names(1) == split.names(1)


def test_workers_of_a_forkserver(tmp_path):
    write_images(tmp_path / "a", 6)
    split, _ = open_data(tmp_path).for_evaluation("train")
    loader = make_loader(split, GREY8, 4, workers=1)
    loader.multiprocessing_context = "forkserver"
    here = make_loader(split, GREY8, 4)
    assert torch.equal(*(torch.cat([batch["image"] for batch in each]) for each in (loader, here)))


def test_resized_pixels_and_given_channels():
    split = open_data("digits").splits["test"]
    dataset = ImageDataset(split.subset(range(5)), Preprocessing(3, (12, 16), (0,) * 3, (1,) * 3))
    assert dataset.pixels.shape == (5, 3, 12, 16)
