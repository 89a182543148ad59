"""Latents: opening what was encoded, its faults, what a generator's batches are drawn from."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from helpers.encoding import SIZE

from gspn.data.labelled import DataError
from gspn.data.latent_files import ABOUT
from gspn.data.latent_folder import is_latents
from gspn.data.latents import make_latent_loader, open_latents
from gspn.data.loader import batches
from gspn.sampling.encode import encode

# -- opening and reading --


def test_truncated_foreign_missing_and_left_over_shards(copied, latents, tmp_path):
    shard = copied / "train-00001.safetensors"
    content = shard.read_bytes()
    for length in (0, 4, 200, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:length])
        with pytest.raises(DataError, match=f"{shard} is damaged: .* {length} bytes"):
            open_latents(copied)
    shard.unlink()
    with pytest.raises(DataError, match=r"1 shard: train-00001\.safetensors.*gspn encode"):
        open_latents(copied)
    tensors = load_file(latents[1] / shard.name)
    about = {"latents": "0" * 64, "split": "train", "shard": 1, "unreadable": []}
    save_file(tensors, shard, {ABOUT: json.dumps(about)})
    with pytest.raises(DataError, match="other latents"):
        open_latents(copied)
    save_file(tensors, shard)
    with pytest.raises(DataError, match="no gspn encode"):
        open_latents(copied)
    shutil.copy(copied / "test-00000.safetensors", shard)
    with pytest.raises(DataError, match="split test"):
        open_latents(copied)
    shard.write_bytes(content)
    shutil.copy(shard, copied / "train-00007.safetensors")
    with pytest.raises(DataError, match=r"1 shard: train-00007\.safetensors.*config\.json"):
        open_latents(copied)
    (copied / "train-00007.safetensors").rename(copied / "._train-00000.safetensors")  # as a Mac leaves them
    assert open_latents(copied).splits["train"].labels.equal(open_latents(latents[1]).splits["train"].labels)


def rewritten(folder, **tensors):
    """Writes other tensors into the second shard of train."""
    path = folder / "train-00001.safetensors"
    config = open_latents(folder).splits["train"].shards
    about = config.about(1) | {"unreadable": config.read(1)[1]}
    save_file({**load_file(path), **tensors}, path, {ABOUT: json.dumps(about)})


@pytest.mark.parametrize("case", ["shape", "dtype", "rows", "twice", "label", "name", "nan"])
def test_shards_with_another_content(copied, case):
    content = load_file(copied / "train-00001.safetensors")
    index, label, mean = (content[name] for name in ("index", "label", "mean"))
    rewritten(
        copied,
        **{
            "shape": {"mean": mean[:, :2].contiguous()},
            "dtype": {"mean": mean.half()},
            "rows": {name: tensor[:-1].contiguous() for name, tensor in content.items()},
            "twice": {"index": index.clone().fill_(int(index[0]))},
            "label": {"label": label + 2},
            "name": {"more": mean},
            "nan": {"mean": mean * torch.nan},
        }[case],
    )
    message = {"label": "labels from 0 to 3 for 2 classes", "nan": "no finite numbers"}
    with pytest.raises(DataError, match=message.get(case, r"train-00001.* is damaged: it holds")):
        data = open_latents(copied)
        data.splits["train"].posterior(torch.arange(12))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_damaged_in_training_is_one_line(copied, workers):
    loader = make_latent_loader(open_latents(copied).splits["train"], 4, workers=workers)
    rewritten(copied, mean=load_file(copied / "train-00001.safetensors")["mean"] * torch.nan)
    with pytest.raises(DataError) as error:
        list(batches(loader))
    assert "no finite numbers" in str(error.value) and "\n" not in str(error.value)


def test_faults_of_the_configuration(copied, tmp_path):
    with pytest.raises(DataError, match=r"no latents: .*config\.json"):
        open_latents(tmp_path / "nowhere")
    config = json.loads((copied / "config.json").read_text())
    for change, message in (
        ({"kind": "other"}, "something else"),
        ({"format": 99}, "newer gspn"),
        ({"format": "x"}, "format is 'x'"),
        ({"vae": None}, "is damaged"),
        ({"vae": {"digest": "0"}}, "KeyError: 'scaling_factor'"),
        ({"splits": 3}, "is damaged"),
        ({"dtype": "int8"}, "is damaged"),
        ({"flip": False}, "other latents"),
    ):
        (copied / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DataError, match=message):
            open_latents(copied)
    (copied / "config.json").write_text("{")
    assert not is_latents(copied)


# -- batches --


def epoch(loader, number=0, done=0):
    loader.begin(number, done)
    return list(loader)


def test_training_batches_are_samples_of_the_posterior(latents):
    split = latents[0].splits["train"]
    draws = []
    for number in range(200):
        loader = make_latent_loader(split, 12, train=True, seed=1)
        (batch,) = epoch(loader, number)
        draws.append(batch["image"][batch["index"].argsort()])
    draws = torch.stack(draws).double()
    assert batch["image"].dtype == torch.float32 and batch["label"].equal(split.labels[batch["index"]])
    mean, std = split.posterior(torch.arange(12))
    assert std.min() > 1e-3  # so that something is to be drawn
    error = (draws.mean(0) - (mean - 0.25) * 0.5) / (std * 0.5 / 200**0.5)  # a standard normal each
    assert error.abs().max() < 5.5 and 0.9 < error.std() < 1.1
    assert (draws.std(0) / (std * 0.5)).mean() == pytest.approx(1, abs=0.02)


def test_evaluation_batches_are_the_means_in_order(latents):
    split = latents[0].splits["train"]
    found = epoch(make_latent_loader(split, 5, flip=True, seed=3))
    assert [len(batch["label"]) for batch in found] == [5, 5, 2]
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(12))
    mean, _ = split.posterior(torch.arange(12))
    assert torch.cat([batch["image"] for batch in found]).equal((mean - 0.25) * 0.5)


def test_order_and_draws_belong_to_seed_epoch_and_index_alone(latents):
    split = latents[0].splits["train"]

    def rows(batch_size=4, number=2, done=0, flip=True, seed=9, workers=0):
        loader = make_latent_loader(split, batch_size, train=True, flip=flip, seed=seed, workers=workers)
        found = epoch(loader, number, done)
        return {i: image for batch in found for i, image in zip(batch["index"].tolist(), batch["image"], strict=True)}

    def same(one, other):
        return all(one[i].equal(other[i]) for i in one.keys() & other.keys())

    whole = rows()
    assert sorted(whole) == list(range(12)) and [*whole] != sorted(whole)
    for other in (rows(3), rows(6), rows(done=1), rows(workers=1)):
        assert same(whole, other)
    assert [*rows(done=1)] == [*whole][4:] and len(rows(5)) == 10 and len(rows(100)) == 12
    assert not same(whole, rows(number=3)) and not same(whole, rows(seed=8)) and [*whole] != [*rows(number=3)]
    assert not same(whole, rows(flip=False))


def test_half_of_the_images_are_mirrored(latents):
    split = latents[0].splits["train"]
    pair = [split.posterior(torch.arange(12), torch.full((12,), m))[0] for m in (False, True)]
    mirrored = []
    for number in range(100):
        (batch,) = epoch(make_latent_loader(split, 12, train=True, flip=True), number)
        z = batch["image"] / 0.5 + 0.25
        distance = [(z - mean[batch["index"]]).square().flatten(1).mean(1) for mean in pair]
        mirrored.append(distance[1] < distance[0])
    assert torch.stack(mirrored).float().mean() == pytest.approx(0.5, abs=0.06)


def test_flip_needs_the_mirrored_images(pictures, vae, tmp_path):
    split = encode(pictures, vae, tmp_path / "x", splits=["test"], **SIZE).splits["test"]
    with pytest.raises(DataError, match="gspn encode --flip"):
        make_latent_loader(split, 2, train=True, flip=True)
    with pytest.raises(DataError, match=r"image 0 .*latent"):
        split.image(0)
    assert split.channels() == 3


def test_few_shards_stay_open_and_a_split_can_be_sent_to_a_worker(latents, monkeypatch):
    monkeypatch.setattr("gspn.data.latent_files.OPEN_SHARDS", 2)
    split = open_latents(latents[1]).splits["train"]
    every = torch.tensor([11, 0, 5, 3, 9, 1])
    mean, _ = split.posterior(every)
    assert [*split.shards.mapped] == [1, 2]
    sent = pickle.loads(pickle.dumps(split))
    assert not sent.shards.mapped and sent.posterior(every)[0].equal(mean)
    assert mean.equal(latents[0].splits["train"].posterior(torch.arange(12))[0][every])
