"""`gspn encode`: what is encoded, that nothing is lost or done twice, folders and VAEs that cannot be used."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.files import half_written
from helpers.training import other_byte, tree
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

pytest.importorskip("diffusers")

from helpers.encoding import SIZE, make_vae

from gspn.cli import app
from gspn.data.images import Split
from gspn.data.labelled import Data, DataError, open_data
from gspn.data.latent_files import identity
from gspn.data.latent_folder import is_latents
from gspn.data.latents import open_latents
from gspn.metrics.classification import evaluate
from gspn.options import OptionError
from gspn.sampling import encode as encode_module
from gspn.sampling.encode import encode
from gspn.sampling.vae import describe_vae, open_vae
from gspn.tasks.classify import train_classifier
from gspn.train.run import RunError

# -- what is encoded --


def test_every_readable_image_once_as_the_vae_gives_it(latents, pictures, vae):
    data, out = latents
    model, train = open_vae(vae), data.splits["train"]
    images = open_data(pictures).splits["train"]
    assert [*tree(out)] and sorted(f.name for f in out.glob("*.safetensors")) == [
        *(f"{name}.safetensors" for name in ("test-00000", "train-00000", "train-00001", "train-00002"))
    ]
    assert (data.kind, data.channels, data.size, data.image_size, data.flip) == ("latents", 3, (8, 4), (16, 8), True)
    assert (len(train), len(data.splits["test"])) == (12, 3) and train.class_names == ["cat", "dog"]
    assert train.labels.tolist() == [0] * 6 + [1] * 6 and data.splits["test"].labels.tolist() == [1] * 3
    assert train.names(5).endswith("train, image 6")  # number 5 is the damaged one
    assert len(data.unreadable) == 1 and data.unreadable[0].startswith(str(pictures / "train" / "cat" / "5.png"))
    for i, original in ((0, 0), (5, 6), (11, 12)):
        # the middle 24x12 of the 24x20 image
        image = images.image(original).resize((8, 16), Image.Resampling.BICUBIC, box=(4, 0, 16, 24))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        for mirrored, x in ((False, pixels), (True, pixels.flip(-1))):
            with torch.inference_mode():
                expected = model.encode(x).latent_dist
            mean, std = train.posterior(torch.tensor([i]), torch.tensor([mirrored]))
            assert torch.allclose(mean, expected.mean, atol=1e-4) and torch.allclose(std, expected.std, atol=1e-4)
            assert mean.shape == (1, 3, 8, 4)
    assert not torch.allclose(*(train.posterior(torch.tensor([0]), torch.tensor([m]))[0] for m in (True, False)))


def test_grey_pixels_in_memory_and_a_split_of_which_a_part_is_held_out(vae, tmp_path):
    names = [str(i) for i in range(10)]
    data = encode("digits", vae, tmp_path / "a", size=(4, 4), workers=0, shard_size=700, batch_size=100)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 1438, "test": 359}
    assert data.splits["train"].labels.equal(open_data("digits").splits["train"].labels)
    assert data.splits["train"].class_names == names
    # only the training images: some of them are held out, as open_data does it
    for file in (tmp_path / "a").glob("test-*"):
        file.unlink()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["splits"]["test"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    data = open_latents(tmp_path / "a", val_fraction=0.2)
    train, held_out, name = data.for_training()
    assert (name, len(train) + len(held_out)) == ("val", 1438) and abs(len(held_out) - 0.2 * 1438) < 5
    whole, picked = data.splits["all"], held_out.names.index
    assert not set(picked.tolist()) & set(train.names.index.tolist())
    assert held_out.labels.equal(whole.labels[picked])
    at = torch.tensor([0, len(held_out) - 1])
    assert held_out.posterior(at)[0].equal(whole.posterior(picked[at])[0])
    assert data.fingerprint() != open_latents(tmp_path / "a", val_fraction=0.1).fingerprint()


@pytest.mark.parametrize(("dtype", "digits"), [("bf16", 8), ("fp16", 11)])
def test_stored_dtype(latents, pictures, vae, tmp_path, dtype, digits):
    data = encode(pictures, vae, tmp_path / "x", flip=True, shard_size=5, batch_size=2, dtype=dtype, **SIZE)
    every = torch.arange(12)
    for exact, rounded in zip(*(each.splits["train"].posterior(every) for each in (latents[0], data)), strict=True):
        assert rounded.dtype == torch.float32 and not rounded.equal(exact)
        assert ((rounded - exact).abs() <= exact.abs() * 2.0**-digits + 1e-7).all()


def test_classes_of_other_numbers_in_another_split(pictures, vae, tmp_path):
    data = encode(pictures, vae, tmp_path / "x", splits=["test"], **SIZE)
    assert data.splits["test"].labels.tolist() == [1, 1, 1] and data.splits["test"].class_names == ["cat", "dog"]
    assert [*data.splits] == ["test"]
    more = encode(pictures, vae, tmp_path / "x", splits=["train"], **SIZE)
    assert sorted(more.splits) == ["test", "train"] and len(more.splits["train"]) == 12


def test_classes_without_names():
    splits = {"test": Split([0, 4], None, pixels=torch.zeros(2, 1, 4, 4)), "train": Split([1, 2], None)}
    relabelled = encode_module._relabelled(Data("idx", "somewhere", splits))
    assert [*relabelled] == ["train", "test"]
    assert all(split.class_names == ["0", "1", "2", "3", "4"] for split in relabelled.values())


def test_bf16_vae_and_values_that_do_not_fit(pictures, vae, tmp_path):
    data = encode(pictures, vae, tmp_path / "x", precision="bf16", splits=["test"], **SIZE)
    mean, _ = data.splits["test"].posterior(torch.arange(3))
    exact, _ = encode(pictures, vae, tmp_path / "y", splits=["test"], **SIZE).splits["test"].posterior(torch.arange(3))
    assert 0 < (mean - exact).abs().max() < 0.1 * exact.abs().max()
    large = make_vae()
    large.quant_conv.weight.data *= 1e9
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(DataError, match=r"0\.png .*not finite.*fp16"):
        encode(pictures, tmp_path / "large", tmp_path / "z", dtype="fp16", **SIZE)


# -- nothing lost, nothing twice --


class Killed(BaseException):
    pass


def test_shards_can_be_read_by_whom_other_files_can(latents, tmp_path):
    (tmp_path / "new").touch()
    shards = sorted(latents[1].glob("*.safetensors"))
    assert shards and all(shard.stat().st_mode == (tmp_path / "new").stat().st_mode for shard in shards)


def test_an_interrupted_encoding_goes_on_to_the_same_files(latents, pictures, vae, tmp_path, monkeypatch):
    count, posterior = [0], encode_module._posterior

    def killing(*arguments):
        count[0] += 1
        if count[0] in (7, 14):  # in the middle of the first shard; later, of another one
            raise Killed
        return posterior(*arguments)

    monkeypatch.setattr(encode_module, "_posterior", killing)
    left = []
    for _ in range(2):
        with pytest.raises(Killed):
            encode(pictures, vae, tmp_path / "x", flip=True, shard_size=5, batch_size=2, **SIZE)
        left.append(len([*(tmp_path / "x").glob("*.safetensors")]))
        with pytest.raises(DataError, match="incomplete"):
            open_latents(tmp_path / "x")
        half_written(tmp_path / "x" / "train-00002.safetensors").write_bytes(b"half written")
    assert left == [1, 2]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "x").glob("*.safetensors")}
    encode(pictures, vae, tmp_path / "x", flip=True, shard_size=5, batch_size=2, **SIZE)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert tree(tmp_path / "x") == tree(latents[1])
    calls = count[0]
    encode(pictures, vae, tmp_path / "x", flip=True, shard_size=5, batch_size=2, **SIZE)  # there is nothing to do
    assert count[0] == calls and tree(tmp_path / "x") == tree(latents[1])


def test_processes_share_the_shards(latents, pictures, vae, tmp_path, monkeypatch):
    barrier, worked, posterior = threading.Barrier(3, timeout=600), Counter(), encode_module._posterior

    def recorded(vae, image, config):
        worked[threading.current_thread().name] += len(image)
        return posterior(vae, image, config)

    def of_thread():
        name = threading.current_thread().name
        places = dict(process_index=int(name), num_processes=3, is_main_process=name == "0")
        return SimpleNamespace(device=torch.device("cpu"), wait_for_everyone=barrier.wait, **places)

    models = {str(i): open_vae(vae) for i in range(3)}  # which diffusers cannot do in two threads at a time
    monkeypatch.setattr(encode_module, "open_vae", lambda path: models[threading.current_thread().name])
    monkeypatch.setattr(encode_module, "_posterior", recorded)
    monkeypatch.setattr(encode_module, "make_accelerator", of_thread)
    (tmp_path / "x").mkdir()
    shutil.copy(latents[1] / "config.json", tmp_path / "x")
    (tmp_path / "x" / "test-00000.safetensors").write_bytes(b"cut")  # which nobody must take for done
    found, arguments = [], dict(flip=True, shard_size=5, batch_size=2, **SIZE)
    threads = [
        threading.Thread(name=str(i), target=lambda: found.append(encode(pictures, vae, tmp_path / "x", **arguments)))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # the mirrored images too: train-00000 and test-00000, train-00001, train-00002 of 3 images
    assert worked == {"0": 2 * (5 + 3), "1": 2 * 5, "2": 2 * 3}
    assert tree(tmp_path / "x") == tree(latents[1])
    assert [each.fingerprint() for each in found] == [latents[0].fingerprint()] * 3  # each has waited for all


def test_waiting_for_a_process_that_died_ends(latents, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "PATIENCE", 0.3)
    config = latents[0].config
    (tmp_path / "train-00000.safetensors").touch()
    plan = encode_module._Plan(tmp_path, config, config, None, [("train", 0), ("train", 1)], [], [])
    with encode_module._Bar(None, plan) as bar, pytest.raises(RunError, match=r"1 of 2 shards .*train-00001"):
        bar.wait_for_the_others()


@pytest.mark.slow
def test_two_processes_of_torchrun(latents, pictures, vae, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "gspn", "encode", pictures, "--vae", vae, "--out", tmp_path / "x", "--size", "16x8", "--flip"]
    result = subprocess.run(
        [str(part) for part in [*command, "--shard-size", 5, "--batch-size", 2, "--workers", 1]],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("3x8x4") == 1 and result.stderr.count("1 unreadable image left out") == 1
    made = open_latents(tmp_path / "x")
    for name, split in latents[0].splits.items():
        every = torch.arange(len(split))
        assert made.splits[name].labels.equal(split.labels)
        # to rounding: torch may compute with another number of threads here
        assert torch.allclose(made.splits[name].posterior(every)[0], split.posterior(every)[0], atol=1e-5)
    assert made.fingerprint() == latents[0].fingerprint()


def test_a_damaged_shard_is_encoded_anew_and_a_foreign_one_is_not_touched(copied, latents, pictures, vae, tmp_path):
    again = dict(flip=True, shard_size=5, batch_size=2, **SIZE)
    shard = copied / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    encode(pictures, vae, copied, **again)
    assert tree(copied) == tree(latents[1])
    shutil.copy(copied / "train-00000.safetensors", shard)
    before = tree(copied)
    with pytest.raises(DataError, match=r"train-00001.* shard 1 of train .* shard 0"):
        encode(pictures, vae, copied, **again)
    assert tree(copied) == before


def test_a_folder_begun_otherwise_is_refused(copied, pictures, vae, tmp_path):
    again = dict(flip=True, shard_size=5, **SIZE)
    before = tree(copied)
    make_vae(seed=1).save_pretrained(tmp_path / "other")
    shutil.copytree(pictures, tmp_path / "fewer")
    (tmp_path / "fewer" / "train" / "cat" / "0.png").unlink()
    for data, model, changed, message in (
        (pictures, tmp_path / "other", {}, r"the VAE .*vae, not .*other"),
        (tmp_path / "fewer", vae, {}, r"the data .*, not .*fewer"),
        ("digits", vae, {}, "the data .*, not digits"),
        (pictures, vae, {"size": (16, 16)}, r"image size \[16, 8\], not \[16, 16\]"),
        (pictures, vae, {"flip": False}, "flip True, not False"),
        (pictures, vae, {"dtype": "bf16"}, "dtype fp32, not bf16"),
        (pictures, vae, {"shard_size": 4}, "shard size 5, not 4"),
        (pictures, vae, {"precision": "bf16"}, "precision fp32, not bf16"),
    ):
        with pytest.raises(RunError, match=f"with .*{message}"):
            encode(data, model, copied, **again | changed)
    assert tree(copied) == before
    # the same data and the same VAE elsewhere are the same
    shutil.copytree(pictures, tmp_path / "moved")
    shutil.copytree(vae, tmp_path / "pipeline" / "vae")
    encode(tmp_path / "moved", tmp_path / "pipeline", copied, **again)
    now = tree(copied)
    assert {name for name in before if now[name] != before[name]} == {"config.json"} and now.keys() == before.keys()
    # where training finds it, and where the next message finds them
    assert open_latents(copied).vae["path"] == str(tmp_path / "pipeline")
    assert open_latents(copied).config["data"]["where"] == str(tmp_path / "moved")


def test_another_val_fraction_is_called_by_its_name(vae, tmp_path):
    pets, out = tmp_path / "pets", tmp_path / "out"
    (pets / "cats").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (8, 16), (i, 0, 0)).save(pets / "cats" / f"{i}.png")
    encode(pets, vae, out, **SIZE)  # with the default, 0.1
    same = "or the same data with val fraction 0.1, not 0.5. Choose"
    with pytest.raises(RunError, match=re.escape(f"with the data {pets}, as it was then, {same}")):
        encode(pets, vae, out, val_fraction=0.5, **SIZE)
    # other data, which the fraction must not hide
    other = shutil.copytree(pets, tmp_path / "other")
    Image.new("RGB", (8, 16), "blue").save(other / "cats" / "8.png")
    with pytest.raises(RunError, match=re.escape(f"with the data {pets}, not {other}, {same}")):
        encode(other, vae, out, val_fraction=0.5, **SIZE)
    with pytest.raises(RunError, match=re.escape(f"with the data {pets}, not {other}. Choose")):
        encode(other, vae, out, val_fraction=0.1, **SIZE)  # given, but the same


def test_an_image_of_the_same_size_and_time_is_other_data(copied, pictures, vae, tmp_path):
    again, moved = dict(flip=True, shard_size=5, **SIZE), shutil.copytree(pictures, tmp_path / "moved")
    encode(moved, vae, copied, **again)
    other_byte(moved / "train" / "dog" / "3.png")
    with pytest.raises(RunError, match=r"the data .*moved, as it was then"):
        encode(moved, vae, copied, **again)


def test_latents_are_known_by_what_is_in_them(copied, latents):
    assert open_latents(copied).fingerprint() == latents[0].fingerprint()
    other_byte(copied / "train-00001.safetensors")
    assert open_latents(copied).fingerprint() != latents[0].fingerprint()


def test_latents_that_an_older_version_began_are_gone_on_with(copied, pictures, vae, tmp_path):
    """Its digests, in config.json and in each shard, are of the earlier scheme, and stay so."""
    again, other = dict(flip=True, shard_size=5, batch_size=2, **SIZE), tmp_path / "other"
    config = json.loads((copied / "config.json").read_text())
    config["data"]["fingerprint"] = open_data(pictures).fingerprint(like="")
    config["vae"]["digest"] = describe_vae(open_vae(vae), vae, like="")["digest"]
    (copied / "config.json").write_text(json.dumps(config))
    for file in copied.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["gspn"]) | {"latents": identity(config)}
        save_file(load_file(file), file, {"gspn": json.dumps(about)})
    assert len(identity(config)) == len(config["vae"]["digest"]) == len(config["data"]["fingerprint"]) == 64
    whole = tree(copied)
    shard = copied / "train-00001.safetensors"
    shard.unlink()
    told = Console(file=io.StringIO(), width=200)
    encode(pictures, vae, copied, **again, console=told)
    assert tree(copied) == whole and "names and sizes" in told.file.getvalue()
    # it is told too where config.json changes; data that were not compared keep their place there
    moved, told = shutil.copytree(vae, tmp_path / "moved"), Console(file=io.StringIO(), width=200)
    encode(shutil.copytree(pictures, tmp_path / "pictures"), moved, copied, **again, console=told)
    assert "names and sizes" in told.file.getvalue() and open_latents(copied).vae["path"] == str(moved)
    assert open_latents(copied).config["data"]["where"] == str(pictures)
    told = Console(file=io.StringIO(), width=200)
    encode(pictures, vae, tmp_path / "new", **again, console=told)
    assert "names and sizes" not in told.file.getvalue()
    make_vae(seed=1).save_pretrained(other)
    with pytest.raises(RunError, match="with the VAE"):
        encode(pictures, other, copied, **again)


def test_folders_in_the_way(pictures, vae, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"task": "classification"}')
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    for out, message in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "not empty.*gspn encode"),
        (tmp_path / "run", r"no latents: .*config\.json"),
    ):
        with pytest.raises((OptionError, RunError), match=message):
            encode(pictures, vae, out, **SIZE)
    assert not is_latents(tmp_path / "run") and not is_latents(tmp_path / "full") and not is_latents("digits")


def test_another_process_that_begins_at_the_same_time(pictures, vae, tmp_path, monkeypatch):
    missing = encode_module._missing

    def overtaken(out, config):
        monkeypatch.setattr(encode_module, "_missing", missing)
        found = missing(out, config)
        encode(pictures, vae, out, splits=["test"], shard_size=2, **SIZE)
        return found

    for folder, shard_size, message in (
        ("x", 5, "shard size 2, not 5"),
        ("y", 2, "another process"),
    ):
        monkeypatch.setattr(encode_module, "_missing", overtaken)
        with pytest.raises(RunError, match=message):
            encode(pictures, vae, tmp_path / folder, splits=["train"], shard_size=shard_size, **SIZE)
        assert len(open_latents(tmp_path / folder).splits["test"]) == 3


def test_unreadable_images(pictures, vae, tmp_path, latents, copied):
    with pytest.raises(DataError, match=r"\(--strict\): .*5\.png"):
        encode(pictures, vae, tmp_path / "x", strict=True, **SIZE)
    assert not list((tmp_path / "x").glob("*.safetensors"))
    (copied / "train-00002.safetensors").unlink()
    with pytest.raises(DataError, match=r"\(--strict\): .*5\.png"):  # it was encoded without it
        encode(pictures, vae, copied, flip=True, shard_size=5, strict=True, **SIZE)
    assert not (copied / "train-00002.safetensors").exists()
    only = tmp_path / "only" / "train" / "cat"
    only.mkdir(parents=True)
    for name in ("a", "b"):
        shutil.copy(pictures / "train" / "cat" / "5.png", only / f"{name}.png")
    with pytest.raises(DataError, match=r"none of its 1 images .*a\.png"):
        encode(tmp_path / "only", vae, tmp_path / "y", **SIZE)


def test_a_stream(pictures, vae, tmp_path, latents):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "tables").mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    for name, split in open_data(pictures).splits.items():
        files = [open(split.names(i), "rb").read() for i in range(len(split))]
        rows = {
            "image": [{"bytes": file, "path": None} for file in files],
            "label": split.relabelled(["cat", "dog"]).labels.tolist(),
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "tables" / f"{name}.parquet")
    arguments = dict(streaming=True, flip=True, shard_size=5, batch_size=2, **SIZE)
    encode(tmp_path / "tables", vae, tmp_path / "x", **arguments)
    for name, number in (("train", 1), ("train", 0), ("test", 0)):
        (tmp_path / "x" / f"{name}-{number:05}.safetensors").unlink()
    data = encode(tmp_path / "tables", vae, tmp_path / "x", **arguments)
    for name, split in latents[0].splits.items():
        every = torch.arange(len(split))
        assert data.splits[name].labels.equal(split.labels)
        assert data.splits[name].posterior(every)[0].equal(split.posterior(every)[0])
    assert len(data.unreadable) == 1


def test_latents_are_no_images(latents, vae, digits_run, tmp_path):
    calls = (
        lambda: encode(latents[1], vae, tmp_path / "x", **SIZE),
        lambda: train_classifier(latents[1], tmp_path / "x"),
        lambda: evaluate(digits_run[0].path, latents[1]),
    )
    for call in calls:
        with pytest.raises(DataError, match=r"latents.*gspn encode.*gspn train-diffusion"):
            call()
    assert not (tmp_path / "x").exists()


# -- the VAE --


def test_faults_of_the_vae(pictures, vae, tmp_path):
    make_vae(latents_mean=(0.0,) * 3).save_pretrained(tmp_path / "channels")
    lacking = shutil.copytree(vae, tmp_path / "lacking") / "diffusion_pytorch_model.safetensors"
    tensors = load_file(lacking)
    save_file({name: tensor for name, tensor in tensors.items() if name != "quant_conv.bias"}, lacking)
    cut = shutil.copytree(vae, tmp_path / "cut") / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    for name, config in {"other": {"_class_name": "UNet2DModel"}, "run": {"format": 1}, "vit": {"size": 3}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for name, message in (
        ("channels", "latents_mean and latents_std: .*neither"),
        ("lacking", r"lacks 1 .*quant_conv\.bias"),
        ("cut", "cut cannot be loaded"),
        ("other", "UNet2DModel.*AutoencoderKL"),
        ("run", "run is a run of gspn, not a VAE of diffusers: expected the folder of an AutoencoderKL"),
        ("vit", "vit is another model, not a VAE"),
        ("other2", "other2 cannot be loaded: there is no folder .*other2 here .did you mean .*other"),
    ):
        with pytest.raises(OptionError, match=message):
            encode(pictures, tmp_path / name, tmp_path / "x", **SIZE)
    assert not (tmp_path / "x").exists()


# -- the command --


def test_the_command(pictures, vae, tmp_path):
    command = ["encode", str(pictures), "--vae", str(vae), "--out", str(tmp_path / "x"), "--workers", "0"]
    result = CliRunner().invoke(app, [*command, "--size", "8", "--split", "test", "--dtype", "fp16"])
    assert result.exit_code == 0, result.output
    assert "3 (test)" in result.output and "3x4x4" in result.output
    result = CliRunner().invoke(app, [*command, "--size", "8", "--dtype", "fp16", "--json"])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["images"] == {"test": 3, "train": 12} and "5.png" in result.stderr
    # of the split train, a training will hold out a part, which is encoded too
    alone = [*command[:-3], str(tmp_path / "y"), "--size", "8", "--split", "train", "--json", "--workers", "0"]
    result = CliRunner().invoke(app, alone)
    assert json.loads(result.stdout)["images"] == {"train": 12} and len(open_latents(tmp_path / "y").splits["val"]) > 0
    for flags, message in (
        (["--size", "9"], r"size .* 2\b.* 9x9"),
        (["--size", "8x"], "--size .*'8x'"),
        (["--size", "8", "--dtype", "fp8"], "dtype .*'fp8'"),
        (["--size", "8", "--precision", "fp16"], "precision .*'fp16'"),
        (["--size", "8", "--shard-size", "0"], "shard_size .* 0"),
        (["--size", "8", "--batch-size", "0"], "batch_size .* 0"),
        (["--size", "8", "--split", "val"], "split 'val'.*train, test"),
        (["--size", "8"], "dtype fp16, not fp32"),
    ):
        result = CliRunner().invoke(app, [*command, *flags])
        assert result.exit_code == 2 and re.search(message, " ".join(result.output.split())), result.output
