"""What `gspn fid` keeps in files, and what an interruption leaves."""

import errno
import json
import os

import pytest
import torch
from helpers.comparing import NAMES, as_npz, colour_extractor, colour_features, compare, looked_at, paint_both
from helpers.files import half_written
from helpers.training import other_byte, same
from PIL import Image

from gspn.data.images import DataError
from gspn.files import SaveError, save_tensors
from gspn.metrics import image_statistics
from gspn.metrics.features import Extractor
from gspn.metrics.image_sets import ImageSet, open_images
from gspn.metrics.image_statistics import read_statistics
from gspn.options import OptionError


@pytest.fixture
def pictures(tmp_path):
    return paint_both(tmp_path)


def test_the_reference_is_looked_at_once(pictures):
    extractor, cache = colour_extractor(), pictures.at / "cache"
    first = compare(pictures.drawn, pictures.real, extractor, cache=cache)
    samples, reference = first["samples"]["images"], first["reference"]["images"]
    assert looked_at(extractor) == samples + reference
    assert len(list(cache.glob("*.safetensors"))) == 1  # samples come and go
    assert compare(pictures.drawn, pictures.real, extractor, cache=cache) == first
    assert looked_at(extractor) == samples
    renamed = Extractor("renamed", extractor.network, 3, extractor.rule, NAMES)
    (pictures.real.parent / "real").rename(pictures.at / "elsewhere")
    compare(pictures.drawn, pictures.at / "elsewhere", renamed, cache=cache)
    assert looked_at(extractor) == samples


def test_the_cache_of_a_reference_stays_where_the_samples_are_the_same_images(pictures):
    extractor, cache = colour_extractor(), pictures.at / "cache"
    same_images = dict(split="all", samples_split="all", cache=cache)
    found = compare(pictures.real, pictures.real, extractor, **same_images)
    assert found["frechet_distance"] < 1e-6 and looked_at(extractor) == found["reference"]["images"]
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_the_cache_of_a_reference_stays_where_its_images_are_samples_later(pictures):
    extractor, cache = colour_extractor(), pictures.at / "cache"
    sets = as_npz(pictures.at / "a.npz", pictures.images[0]), as_npz(pictures.at / "b.npz", pictures.images[1])
    for samples, reference in (sets, sets[::-1]):
        compare(samples, reference, extractor, cache=cache)
    looked_at(extractor)
    assert len(list(cache.glob("*.safetensors"))) == 2
    compare(*sets, extractor, cache=cache)
    assert looked_at(extractor) == 0 and len(list(cache.glob("*.safetensors"))) == 2


def test_anything_else_is_computed_anew(pictures):
    extractor, cache = colour_extractor(), pictures.at / "cache"
    go = lambda **more: compare(pictures.drawn, pictures.real, extractor, cache=cache, **more)  # noqa: E731
    whole = go()["samples"]["images"]
    both = looked_at(extractor)
    go(size=(6, 6))
    assert looked_at(extractor) == both
    go(split="val")
    assert looked_at(extractor) == whole + 6
    extractor.class_names = NAMES[::-1]
    assert go()["reference_accuracy"] == pytest.approx(1 / 3)
    assert looked_at(extractor) == both
    with torch.no_grad():
        extractor.network.weight.fill_(0.5)
    go()
    assert looked_at(extractor) == both
    for file in sorted((pictures.real / "red").iterdir()):  # other pixels in files of the same names and sizes
        size = file.stat().st_size
        Image.new("RGB", (8, 10), (200, len(file.name), 30)).save(file)
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    go()
    assert looked_at(extractor) == both
    file = pictures.real / "green" / "07.png"  # one of 60 alone, changed where it is not seen, of the same time
    other_byte(file)
    go()
    assert looked_at(extractor) == both
    go()
    assert looked_at(extractor) == whole


def test_every_image_of_any_kind_of_set_counts(pictures):
    flat, npz, folder = (pictures.at / name for name in ("flat", "some.npz", "samples"))
    flat.mkdir()
    (folder / "images").mkdir(parents=True)
    about = {"format": 1, "settings": {"seed": 0}, "count": 36, "classes": [0], "class_names": ["blue"]}
    (folder / "samples.json").write_text(json.dumps(about))
    for i, pixels in enumerate(pictures.images[0]):
        for path in (flat / f"{i:03}.png", folder / "images" / f"{i:06}-blue.png"):
            Image.fromarray(pixels).save(path)
    as_npz(npz, pictures.images[0])
    for where, file in ((flat, flat / "017.png"), (folder, folder / "images" / "000017-blue.png"), (npz, npz)):
        before = open_images(where).identity()
        place = 5000 if file == npz else -1  # as one writes to a mapped array: without a new checksum
        other_byte(file, place)
        assert open_images(where).identity() != before
        other_byte(file, place)
        assert open_images(where).identity() == before


def test_images_are_read_for_a_digest_only_where_something_is_kept(pictures, monkeypatch):
    read = []
    monkeypatch.setattr(ImageSet, "identity", lambda self, console=None: read.append(self.where) or "2:0")
    compare(pictures.drawn, pictures.real)
    assert read == []
    compare(pictures.drawn, pictures.real, save=pictures.at / "real.safetensors")
    assert read == [str(pictures.real)]


def test_statistics_that_an_older_version_saved(pictures):
    """Their digests, of the file and of the network, are of the earlier scheme."""
    extractor, file = colour_extractor(), pictures.at / "real.safetensors"
    first = compare(pictures.drawn, pictures.real, extractor, save=file)
    statistics, key = read_statistics(file)
    key["network"] = extractor.digest(like="")
    tensors = {name: tensor.contiguous() for name, tensor in statistics.tensors().items()}
    metadata = {"gspn": json.dumps(key), "digest": image_statistics._digest(tensors, key, like="")}
    assert {len(metadata["digest"]), len(key["network"])} == {64}
    save_tensors(file, tensors, metadata)
    again = compare(pictures.drawn, file, extractor)
    assert again["frechet_distance"] == first["frechet_distance"]
    with torch.no_grad():
        extractor.network.weight.fill_(2)
    with pytest.raises(OptionError, match="features colours"):
        compare(pictures.drawn, file, extractor)


def test_damaged_statistics_are_computed_again(pictures):
    extractor, cache = colour_extractor(), pictures.at / "cache"
    first = compare(pictures.drawn, pictures.real, extractor, cache=cache)
    both = looked_at(extractor)
    (file,) = cache.glob("*.safetensors")
    whole, tensors = file.read_bytes(), read_statistics(file)[0].tensors()
    for damaged in (whole[:-100], whole[:-20] + b"\1" + whole[-19:], b"", b"no file of tensors"):
        file.write_bytes(damaged)
        again = compare(pictures.drawn, pictures.real, extractor, cache=cache)
        assert looked_at(extractor) == both
        assert any(str(file) in note and "damaged" in note for note in again["notes"])
        assert again["frechet_distance"] == first["frechet_distance"]
        assert same(read_statistics(file)[0].tensors(), tensors)


def test_logits_that_are_no_numbers_are_an_error_and_kept_ones_are_computed_again(pictures, monkeypatch):
    extractor, file = colour_extractor(), pictures.at / "real.safetensors"
    first = compare(pictures.drawn, pictures.real, extractor, save=file)
    statistics, key = read_statistics(file)
    statistics.score.probability[0] = torch.nan  # as older versions kept them
    image_statistics.save_statistics(file, statistics, key)
    with pytest.raises(DataError, match=r"real\.safetensors .*no finite numbers"):
        compare(pictures.drawn, file, extractor)
    again = compare(pictures.drawn, pictures.real, extractor, save=file, overwrite=True)
    assert again["reference_score"] == first["reference_score"]
    forward = extractor.network.forward
    monkeypatch.setattr(extractor.network, "forward", lambda x: (forward(x)[0], forward(x)[1] * torch.nan))
    with pytest.raises(DataError, match="logits of image 0 or one after it are no finite numbers"):
        compare(pictures.drawn, pictures.real, extractor)


def test_what_a_killed_call_left_in_the_cache_goes(pictures):
    cache = pictures.at / "cache"
    cache.mkdir()
    half_written(cache / "a.safetensors").write_bytes(b"half")
    compare(pictures.drawn, pictures.real, cache=cache)
    assert sorted(file.suffix for file in cache.iterdir()) == ["", ".safetensors"]


@pytest.mark.parametrize("stop", [3, 9, 13])  # batches: in the reference, after it, in the samples
def test_an_interrupted_call_goes_on_where_it_was(pictures, monkeypatch, stop):
    monkeypatch.setattr(image_statistics, "SAVE_EVERY", 0)
    whole = compare(pictures.drawn, pictures.real, samples_split="all")
    extractor, cache = colour_extractor(), pictures.at / "cache"
    extractor.network.stop = stop
    with pytest.raises(KeyboardInterrupt):
        compare(pictures.drawn, pictures.real, extractor, samples_split="all", cache=cache)
    extractor.network.stop = None
    assert compare(pictures.drawn, pictures.real, extractor, samples_split="all", cache=cache) == whole
    assert looked_at(extractor) == 36 + whole["reference"]["images"]  # each image once
    assert sorted(file.suffix for file in cache.iterdir()) == ["", ".safetensors"]  # the lock, the reference


def test_a_cache_that_cannot_be_written_costs_nothing_but_a_note(pictures):
    blocked = pictures.at / "file"
    blocked.write_text("")
    result = compare(pictures.drawn, pictures.real, cache=blocked / "cache")
    assert any("folder" in note for note in result["notes"])
    assert result["frechet_distance"] == compare(pictures.drawn, pictures.real)["frechet_distance"]
    with pytest.raises(SaveError, match="folder"):
        compare(pictures.drawn, pictures.real, save=blocked / "statistics.safetensors")


def test_a_cache_without_permission_costs_nothing_but_a_note(pictures, monkeypatch):
    cache, stat = pictures.at / "cache", os.stat

    def refuse(path, **more):
        if str(path).startswith(str(cache)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **more)

    monkeypatch.setattr(os, "stat", refuse)
    result = compare(pictures.drawn, pictures.real, cache=cache)
    told = [note for note in result["notes"] if "Permission denied" in note]
    assert told == [f"the cache {cache} cannot be used, nothing is kept there: Permission denied"]
    assert result["frechet_distance"] == compare(pictures.drawn, pictures.real)["frechet_distance"]


def test_saved_statistics_stand_for_the_reference(pictures, monkeypatch):
    extractor, file = colour_extractor(), pictures.at / "real.safetensors"
    there = set(pictures.at.iterdir())
    first = compare(pictures.drawn, pictures.real, extractor, save=file)
    assert set(pictures.at.iterdir()) == there | {file}  # and no lock
    looked_at(extractor)
    again = compare(pictures.drawn, file, extractor)
    assert looked_at(extractor) == first["samples"]["images"]
    ignored = {"reference", "notes"}
    assert {k: v for k, v in again.items() if k not in ignored} == {k: v for k, v in first.items() if k not in ignored}
    assert again["reference"]["images"] == first["reference"]["images"]
    with pytest.raises(OptionError, match=r"10x8.*5x5"):
        compare(pictures.drawn, file, extractor, size=(5, 5))
    with pytest.raises(OptionError, match=r"neither.*split"):
        compare(pictures.drawn, file, extractor, split="train")
    with torch.no_grad():
        extractor.network.weight.fill_(2)
    with pytest.raises(OptionError, match=r"features colours, not .*colours"):
        compare(pictures.drawn, file, extractor)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="damaged"):
        compare(pictures.drawn, file)
    # what an interrupted call left in the cache is not all of the reference
    monkeypatch.setattr(image_statistics, "SAVE_EVERY", 0)
    stopped = colour_extractor()
    stopped.network.stop = 2
    with pytest.raises(KeyboardInterrupt):
        compare(pictures.drawn, pictures.real, stopped, cache=pictures.at / "cache")
    (part,) = (pictures.at / "cache").glob("*.safetensors")
    assert read_statistics(part)[0].done == 14
    with pytest.raises(DataError, match="14 of 54 images"):
        compare(pictures.drawn, part)


def test_statistics_under_a_name_of_another_format(pictures, monkeypatch):
    extractor, file = colour_extractor(), pictures.at / "real.npz"
    with pytest.raises(OptionError, match=r"\.safetensors.*real\.npz"):
        compare(pictures.drawn, pictures.real, extractor, save=file)
    assert looked_at(extractor) == 0 and not file.exists()
    first = compare(pictures.drawn, pictures.real, extractor, save=pictures.at / "real.safetensors")
    (pictures.at / "real.safetensors").rename(file)  # as older versions wrote it
    again = compare(pictures.drawn, file, extractor)
    assert again["frechet_distance"] == first["frechet_distance"] and again["reference"]["where"] == str(file)


def test_kept_features_are_evenly_spaced(pictures, monkeypatch):
    monkeypatch.setattr(image_statistics, "KEPT", 5)
    images = as_npz(pictures.at / "a.npz", pictures.images[0])
    file = pictures.at / "a.safetensors"
    result = compare(images, images, save=file)
    kept = read_statistics(file)[0].kept
    expected = torch.from_numpy(colour_features(pictures.images[0][[0, 9, 18, 26, 35]])).float()
    assert torch.allclose(kept, expected) and result["kernel_distance"]["subset_size"] == 5
