"""Digests: whatever is used changes them, where it lies does not, and those that older versions kept still compare."""

import hashlib
import io
import os
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.training import other_byte
from torch import nn

from gspn import digests
from gspn.data.captions import open_captions
from gspn.data.labelled import open_data
from gspn.data.tables import Stream, load_tables
from gspn.digests import Content, Earlier, digest, is_earlier, settings, tensors_of

# -- one function --


def test_parts_are_never_taken_for_one_another(tmp_path):
    file, zeros = tmp_path / "a", torch.zeros(2, 3)
    file.write_bytes(b"bc")
    lists = [
        [],
        ["a", "bc"],
        ["ab", "c"],
        ["abc"],
        [b"abc"],
        [["abc"]],
        [None],
        [{"a": 1}],
        [zeros],
        [zeros.T],
        [zeros.view(6)],
        [zeros.double()],
        [zeros.int()],
        [zeros.numpy()],
        [zeros.numpy().astype(">f4")],
        [Content(file)],
        [Content(file, file.relative_to(tmp_path))],
        [Content(tmp_path / "none")],
        [Content(b"")],
    ]
    found = [digest(parts) for parts in lists]
    assert len(set(found)) == len(lists)
    assert all(each.startswith("2:") and len(each) == 66 and not is_earlier(each) for each in found)
    assert digest([Content(b"bc", images=3)]) == digest([Content(file)])  # bytes stand for a file
    assert digest(["a", Earlier("b")]) == digest(["a"])


def test_the_order_counts_and_the_number_of_threads_does_not(monkeypatch):
    parts = [Content(os.urandom(i)) for i in range(1200)]
    steps = []
    whole = digest(parts, advance=steps.append)
    assert steps == [512, 512, 176]
    assert digest([*parts[:700], parts[701], parts[700], *parts[702:]]) != whole
    monkeypatch.setattr(digests, "THREADS", 3)
    monkeypatch.setattr(digests, "BATCH", 7)
    assert digest(parts) == whole


def test_files_are_read_in_parallel(monkeypatch):
    together = threading.Barrier(4, timeout=30)  # which four threads pass, or none
    monkeypatch.setattr(digests, "_hash", lambda part: bytes([together.wait() * 0 + len(part)]) * 32)
    assert digest(["a", "b", "c", "d"]) == digest(["e", "f", "g", "h"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.arange(6.0).view(2, 3))
        self.register_buffer("scale", torch.tensor(0.5))


def test_settings_are_what_weights_do_not_tell():
    diffusers = pytest.importorskip("diffusers")
    tiny = dict(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    vae = diffusers.AutoencoderKL(**tiny)
    assert settings(vae) == {"class": "AutoencoderKL", **tiny}
    # written out, as in a file, a default is no other model
    written = diffusers.AutoencoderKL(**tiny, act_fn="silu", down_block_types=["DownEncoderBlock2D"])
    assert digest([settings(written)]) == digest([settings(vae)])
    assert settings(diffusers.AutoencoderKL(**tiny, act_fn="relu"))["act_fn"] == "relu"
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**small, hidden_act="gelu"))
    assert settings(text) == {"class": "CLIPTextModel", **small, "hidden_act": "gelu"}
    ours = SimpleNamespace(config={"name": "gspn_tiny", "activation": "silu", "backend": "cpu"})
    assert settings(ours) == {"class": "SimpleNamespace", "name": "gspn_tiny", "activation": "silu"}
    timm = SimpleNamespace(default_cfg={"architecture": "tf_efficientnet_b0", "url": "https://example.org"})
    assert settings(timm) == {"class": "SimpleNamespace", "architecture": "tf_efficientnet_b0"}
    assert settings(Net()) == {"class": "Net"}


# -- data: each file replaced by another of the same size and time --


def class_folder(at):
    for name, count in (("a", 3), ("b", 4)):
        (at / name).mkdir(parents=True)
        for i in range(count):
            (at / name / f"{i}.png").write_bytes(bytes([i]) * (10 + i))
    return at


def shards(at):
    at.mkdir()
    for split in ("train", "val"):
        with tarfile.open(at / f"{split}-0.tar", "w") as tar:
            for i in range(3):
                members = {"png": bytes([i]) * (600 * i + 5), "cls": str(i).encode(), "txt": b"grey %d" % i}
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"{i}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return at


def captioned(at):
    at.mkdir()
    for i in range(4):
        (at / f"{i}.png").write_bytes(b"x" * i)
        (at / f"{i}.txt").write_text(f"a caption, café {i}", encoding="utf-8")
    return at


def image_of_shards(folder):
    """Where the second image of the first shard lies."""
    with tarfile.open(folder / "train-0.tar") as tar:
        return folder / "train-0.tar", tar.getmember("1.png").offset_data


@pytest.mark.parametrize(
    ("make", "open_", "of"),
    [
        (class_folder, open_data, lambda folder: (folder / "b" / "2.png", -1)),
        (shards, open_data, image_of_shards),
        (shards, open_captions, image_of_shards),
        (captioned, open_captions, lambda folder: (folder / "3.png", 0)),
    ],
    ids=["class folder", "shards", "captioned shards", "captioned folder"],
)
def test_a_replaced_image_is_other_data_and_another_place_is_not(tmp_path, make, open_, of):
    folder = make(tmp_path / "one")
    before, earlier = open_(folder).fingerprint(), open_(folder).fingerprint(like="")
    moved = make(tmp_path / "elsewhere")  # later, too
    assert open_(moved).fingerprint() == before
    other_byte(*of(folder))
    assert open_(folder).fingerprint() != before
    assert open_(folder).fingerprint(like="") == earlier  # names and sizes
    other_byte(*of(folder))
    assert open_(folder).fingerprint() == before


def test_an_image_that_cannot_be_opened_counts_as_that(tmp_path):
    folder = class_folder(tmp_path / "one")
    data = open_data(folder)
    before = data.fingerprint()
    file = folder / "a" / "0.png"
    file.rename(tmp_path / "kept")
    file.symlink_to(tmp_path / "nowhere")
    assert data.fingerprint() != before
    file.unlink()
    (tmp_path / "kept").rename(file)
    assert data.fingerprint() == before


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_that_are_no_utf_8(tmp_path):
    folder = class_folder(tmp_path / "one")
    before = open_data(folder).fingerprint()
    strange = os.fsencode(folder) + b"/b/\xff.png"
    try:
        os.rename(folder / "b" / "3.png", strange)
    except OSError:
        pytest.skip("the file system takes no such names")
    told = open_data(folder).fingerprint()
    assert told != before and is_earlier(open_data(folder).fingerprint(like=""))
    os.rename(strange, os.fsencode(folder) + b"/b/\xfe.png")
    assert open_data(folder).fingerprint() != told


@pytest.fixture
def table(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = class_folder(tmp_path / "pictures")
    files = [str(file) for file in sorted(pictures.rglob("*.png"))]

    def of(cells):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        return datasets.Dataset.from_dict({"image": cells, "label": [0] * 3 + [1] * 4}, features=features)

    contents = [{"bytes": open(file, "rb").read(), "path": "nowhere"} for file in files]
    return SimpleNamespace(files=files, contents=contents, of=of, at=tmp_path, pictures=pictures)


def test_a_table_of_paths_notices_a_replaced_file(table):
    rows = "".join(f"{file},{'ab'[i > 2]}\n" for i, file in enumerate(table.files))
    (table.at / "train.csv").write_text("image,label\n" + rows)
    open_ = lambda: open_data(table.at / "train.csv", image_column="image", label_column="label")  # noqa: E731
    before, earlier = open_().fingerprint(), open_().fingerprint(like="")
    other_byte(table.pictures / "b" / "1.png")
    assert open_().fingerprint() != before and open_().fingerprint(like="") == earlier


def test_a_table_of_contents_notices_another_cell(table):
    def told(cells, order=None):
        saved = table.of(cells)
        saved = saved if order is None else saved.select(order)
        saved.save_to_disk(table.at / "saved", max_shard_size="1KB" if order is None else "1GB")
        splits, _ = load_tables("disk", table.at / "saved")
        (split,) = splits.values()
        return digest(split.identity())

    before = told(table.contents)
    assert told(table.contents) == before
    other = [*table.contents[:-1], {"bytes": b"\1" + table.contents[-1]["bytes"][1:], "path": "nowhere"}]
    assert told(other) != before
    assert told(table.contents, [2, 1, 0, 3, 4, 5, 6]) != before  # of the same labels
    assert told([*table.contents[:-1], None]) != told([*table.contents[:-1], {"bytes": b"x", "path": None}])


def test_a_local_stream_is_read_and_a_remote_one_is_told(table):
    folder = table.at / "parquet"
    folder.mkdir()

    def open_(cells):
        for name in ("train", "validation"):
            table.of(cells).to_parquet(folder / f"{name}.parquet")
        return open_data(folder, streaming=True)

    before = open_(table.contents)
    told = before.fingerprint()
    assert open_(table.contents).fingerprint() == told and before.uncompared(told) is None
    other = [*table.contents[:-1], {"bytes": b"\1" + table.contents[-1]["bytes"][1:], "path": "nowhere"}]
    changed = open_(other)
    assert changed.fingerprint() != told and changed.fingerprint(like="") == before.fingerprint(like="")
    for split in changed.splits.values():
        split.remote = True
    remote = changed.fingerprint()
    assert remote not in (told, open_(other).fingerprint()) and "stream" in changed.uncompared(remote)


# -- what gspn 0.1 wrote: these digests are its own --


def test_fingerprints_of_data_as_they_were(tmp_path):
    data = open_data(class_folder(tmp_path / "folder"))
    told = "cdc36293d73c7dbc7a8ac774c4222108f3deea365748393bb382da8b0a7130b7"
    assert data.fingerprint(like=told) == told and "sizes" in data.uncompared(told)
    assert data.fingerprint() != told and data.uncompared(data.fingerprint()) is None
    (tmp_path / "folder" / "a" / "0.png").write_bytes(b"longer than it was")
    assert open_data(tmp_path / "folder").fingerprint(like=told) != told
    told = "c3fb4569fd12bbcb66f0fde0be2d6e02f2f52714c08852142be7b5651f1e665c"
    digits = open_data("digits")
    assert digits.fingerprint(like=told) == told and digits.uncompared(told) is None  # pixels counted always
    folder = shards(tmp_path / "shards")
    told = "6fc8a515827486e7cedcc88bae5230c44d562fb76834cef0055da58fe2be1536"
    assert open_data(folder).fingerprint(like=told) == told
    told = "7fb3e38a1d0c8e1ed5604066cec3f24aa3690c89bc508d0208fddec1d53287a0"
    assert open_captions(folder).fingerprint(like=told) == told
    told = "9ce66a7095f6abdbfab3e35227b5ce6891cccf7389acbbea141107be89443475"
    assert open_captions(captioned(tmp_path / "captioned")).fingerprint(like=told) == told


def test_fingerprints_of_tables_as_they_were(table):
    import datasets

    table.of(table.contents).to_parquet(table.at / "train.parquet")
    split = open_data(table.at / "train.parquet").splits["all"]
    counted = hashlib.sha256(repr(split.class_names).encode() + split.labels.numpy().tobytes())
    rows = datasets.load_dataset("parquet", data_files=str(table.at / "train.parquet"), split="train")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    counted.update(f"{rows.features} {rows.num_rows} {rows.data.nbytes}".encode())
    assert digest(split.identity(), like="0" * 64) == counted.hexdigest()
    stream = Stream([0, 1], ["a", "b"], SimpleNamespace(features="f"), "image", [1, 1], None)
    stream._rows = lambda: iter([(0, {"bytes": b"x"})])
    counted = hashlib.sha256(repr(["a", "b"]).encode() + stream.labels.numpy().tobytes() + b"('f', [1, 1])")
    assert digest(stream.identity(), like="0" * 64) == counted.hexdigest()


def test_digests_of_weights_as_they_were():
    from gspn.tasks.finetune import Source

    weights = {"body.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.tensor([1, 2])}
    source = Source("x", weights | {"alpha": torch.tensor(0.5)}, "m", {"a": 1}, ["p", "q"], "d")
    told = "45ff1b3aabe2d82e5d353e3a54036876220060ead89b7a9a85c0b2e6f11318b6"
    assert source.digest(like=told) == told
    assert is_earlier(told) and not is_earlier(source.digest()) and not is_earlier(None)


def test_starting_weights_are_known_by_shapes_and_classes_too():
    from gspn.tasks.finetune import Source

    def told(weights, **more):
        return Source("x", weights, **{"name": "m", "model_args": {"a": 1}, "class_names": ["p", "q"]} | more).digest()

    weights = {"w": torch.arange(6.0).view(2, 3)}
    before = told(weights)
    assert told({"w": weights["w"].clone()}, data="elsewhere") == before
    others = [
        told({"w": weights["w"].view(3, 2)}),
        told({"w": weights["w"].view(torch.int32)}),
        told(weights, class_names=["q", "p"]),
        told(weights, model_args={"a": 2}),
    ]
    assert len({before, *others}) == 5


def test_digests_of_what_generates_and_compares_as_they_were():
    diffusers = pytest.importorskip("diffusers")
    from PIL import Image

    from gspn.data.latent_files import identity
    from gspn.metrics import image_statistics
    from gspn.metrics.features import Extractor
    from gspn.options import OptionError
    from gspn.sampling import sample
    from gspn.sampling.vae import check_vae, describe_vae
    from gspn.stable_diffusion.highres.state import described

    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, scaling_factor=0.5)
    with torch.no_grad():
        for tensor in vae.state_dict().values():
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) / 64)
    told = "f1b4c7d44ef9773ec1a6381a53634bcfb1d5414b17c6caa1c84c049db844bf72"
    assert describe_vae(vae, "x", like=told)["digest"] == told
    assert check_vae(vae, {"path": "x", "digest": told}) is vae
    now = describe_vae(vae, "x")["digest"]
    assert not is_earlier(now) and check_vae(vae, {"path": "x", "digest": now}) is vae
    vae.register_to_config(act_fn="relu")  # of the same weights
    with pytest.raises(OptionError, match=r"VAE.*latents"):
        check_vae(vae, {"path": "x", "digest": now})
    vae.register_to_config(act_fn="silu")

    generator = SimpleNamespace(transformer=Net(), vae=vae)
    told = "1663a215faecca3d5c2521231598a8fca911f0a65f5f29ca5774a101cc3770f6"
    assert sample._digest(generator, like=told) == told
    now = sample._digest(generator)
    vae.register_to_config(scaling_factor=0.25)  # which decides what samples look like
    assert sample._digest(generator) not in (now, told)
    told = "2b42a792498ee81272a5480e37494979485c9cb38d91816c180b6da5474ec5fa"
    assert sample._digest(SimpleNamespace(transformer=Net(), vae=None), like=told) == told

    extractor = Extractor("n", Net(), 3, "a rule", ["p", "q"])
    told = "856d20864769a031d679e8511133378417e3cf7d167094133503fd687bb802f6"
    assert extractor.digest(like=told) == told != extractor.digest()
    told = "a51a70481e353ba8054e47dbc722837564f7e8f1552c8de7976e3bc3b25ec55e"
    tensors = {"a": torch.arange(3), "b": torch.zeros(2, 2)}
    assert image_statistics._digest(tensors, {"format": 1}, like=told) == told

    config = dict(format=1, channels=3, dtype="fp32", flip=True, shard_size=5, precision="fp32", size=[4, 2])
    config |= dict(image_size=[16, 8], class_names=["cat", "dog"])
    config |= dict(vae={"digest": "a" * 64}, data={"fingerprint": "b" * 64})
    assert identity(config) == "7ed44952cab06faa0e221b658ea12b7917624038ee2189f5df846aad387bcb11"
    config["data"] = {"fingerprint": "2:" + "b" * 64}
    assert identity(config).startswith("2:")

    values = {"a": Image.new("L", (2, 3)), "t": torch.arange(3), "n": np.zeros(3, np.uint8)}
    told = {"a": "Image b0f66adc83641586", "t": "(3,) torch.int64 ab25350e3e65efeb", "n": "ndarray 709e80c88487a241"}
    assert described(values, earlier=True) == told
    assert described(Image.new("L", (2, 3))) != described(Image.new("L", (3, 2)))
    assert described(np.zeros(3, np.uint8)) != described(np.zeros((3, 1), np.uint8))


def test_networks_of_the_same_weights_are_told_apart_by_their_settings():
    from gspn.metrics.features import Extractor

    one, other = Net(), Net()
    one.default_cfg, other.default_cfg = {"architecture": "efficientnet_b0"}, {"architecture": "tf_efficientnet_b0"}
    assert Extractor("n", one, 3, "r").digest() == Extractor("called otherwise", one, 3, "r").digest()
    assert Extractor("n", one, 3, "r").digest() != Extractor("n", other, 3, "r").digest()


def test_tensors_are_labelled_as_they_always_were():
    parts = list(tensors_of({"b": torch.zeros(2), "a": torch.ones(1, dtype=torch.int8)}, "x {name} {dtype} {shape}"))
    assert parts[::2] == ["x a torch.int8 (1,)", "x b torch.float32 (2,)"]
