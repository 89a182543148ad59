"""Larger images without training: the layers of a swap on sub-lattices of their maps."""

import numpy as np
import pytest
import torch
from helpers.stable_diffusion import tiny_sd
from helpers.swapping import run, unet_of

import gspn
from gspn.lattices import interleaved, sub_lattices


def test_lattices_are_pixels_that_lie_apart():
    x = torch.randn(2, 6, 8, 3)
    y = sub_lattices(x, (3, 2))
    assert y.shape == (12, 2, 4, 3) and torch.equal(interleaved(y, (3, 2)), x)
    for b in range(2):
        for i in range(3):
            for j in range(2):
                assert torch.equal(y[6 * b + 2 * i + j], x[b, i::3, j::2])


@pytest.mark.parametrize("form", ["pure", "qkv"])
def test_a_layer_runs_on_each_lattice_alone(form):
    torch.manual_seed(0)
    layer = gspn.GSPNAttention(8, form=form, segment=2).eval()
    x = torch.randn(2, 6 * 4, 8)
    with torch.no_grad():
        whole = layer(x, map_size=(6, 4))
        layer.apart = (2, 1)
        found = layer(x, map_size=(6, 4)).view(2, 6, 4, 8)
        layer.apart = (1, 1)
        for i in range(2):
            wanted = layer(x.view(2, 6, 4, 8)[:, i::2].reshape(2, 12, 8), map_size=(3, 4))
            torch.testing.assert_close(found[:, i::2].reshape(2, 12, 8), wanted)
        assert torch.equal(layer(x, map_size=(6, 4)), whole)
    layer.apart = (4, 1)
    with pytest.raises(ValueError, match=r"6x4 cannot be divided .*4x1"):
        layer(x, map_size=(6, 4))


@pytest.mark.parametrize(
    "size, apart", [((16, 16), (1, 1)), ((32, 16), (2, 1)), ((24, 32), (2, 2)), ((8, 20), (1, 1)), ((48, 64), (3, 4))]
)
def test_the_ratio_of_the_sizes_says_how_far_apart(size, apart):
    """A pipeline made for 16x16; half goes up; smaller images are left alone."""
    pipe = tiny_sd()
    swapped = gspn.swap(pipe, keep="mid_block", segment=4, init="random")
    with gspn.adapt(pipe, size):
        assert {layer.apart for layer in swapped.layers.values()} == {apart}
    assert {layer.apart for layer in swapped.layers.values()} == {(1, 1)}


def test_of_several_the_one_begun_last_counts_in_whatever_order_they_end():
    pipe = tiny_sd()
    swapped = gspn.swap(pipe, segment=4, init="random")
    apart = lambda: next(iter(swapped.layers.values())).apart  # noqa: E731
    first, second = gspn.adapt(pipe, (32, 32)), gspn.adapt(pipe, (64, 64))
    assert apart() == (4, 4)
    first.close()
    assert apart() == (4, 4) and swapped.adapted
    third = gspn.adapt(pipe, (32, 16))
    assert apart() == (2, 1)
    third.close()
    assert apart() == (4, 4)
    second.close()
    assert apart() == (1, 1) and not swapped.adapted
    with pytest.raises(KeyError), gspn.adapt(pipe, (16, 16)):
        assert swapped.adapted  # although nothing changes at this size
        raise KeyError
    assert not swapped.adapted


def test_the_size_of_another_training_counts_and_is_kept_in_the_file(tmp_path):
    """A pipeline made for 16x16, whose UNet takes 8x8, with layers that were trained for 32x16."""
    pipe = tiny_sd()
    with gspn.swap(pipe, segment=4, init="random") as swapped:
        assert swapped.sample_size is None
        for wrong in (16, (16.0, 8.0), (0, 8), (16,)):
            swapped.sample_size = wrong
            with pytest.raises(ValueError, match=r"sample_size has to be \(height, width\).*got"):
                swapped.save(tmp_path)
            with pytest.raises(ValueError, match=r"^sample_size of the Swap has to be \(height, width\).*got"):
                gspn.adapt(pipe, (32, 16))
        swapped.sample_size = (16, 8)
        swapped.save(tmp_path)
    swapped = gspn.load_swap(pipe, tmp_path)
    assert swapped.sample_size == (16, 8)
    for size, apart in {(32, 16): (1, 1), (64, 16): (2, 1)}.items():
        with gspn.adapt(pipe, size):
            assert {layer.apart for layer in swapped.layers.values()} == {apart}


def test_a_file_says_the_size_of_its_unet(tmp_path, monkeypatch):
    """So that it counts in another UNet too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = tiny_sd()  # whose UNet takes 8x8
    with gspn.swap(pipe, segment=4, init="random") as swapped:
        file = swapped.save("~/layers")
    assert file == tmp_path / "layers" / "gspn_swap.safetensors" and file.is_file()
    assert gspn.load_swap(pipe, "~/layers").sample_size is None
    for own in (16, None):
        other = tiny_sd(sample_size=8)
        other.unet.register_to_config(sample_size=own)
        swapped = gspn.load_swap(other, file)
        assert swapped.sample_size == (8, 8)
        with gspn.adapt(other, (32, 32)):
            assert {layer.apart for layer in swapped.layers.values()} == {(2, 2)}


def test_maps_that_cannot_be_divided_are_refused():
    pipe = tiny_sd()
    swapped = gspn.swap(pipe, segment=4, init="random")
    with pytest.raises(ValueError, match=r"24x40 .* 12x20 .* 2x3.*multiples of 8 and 12"):
        gspn.adapt(pipe, (24, 40))
    with pytest.raises(ValueError, match=r" 7x4 .* 2x1"):  # at the lower level only
        gspn.adapt(pipe, (28, 16))
    assert {layer.apart for layer in swapped.layers.values()} == {(1, 1)}


@pytest.mark.parametrize(
    "size, error, message",
    [
        (32, TypeError, "got 32"),
        ((32, 32, 3), TypeError, "got .32, 32, 3"),
        ((True, 32), TypeError, "got .True, 32"),
        ((0, 32), ValueError, "got 0x32"),
    ],
)
def test_a_size_is_a_height_and_a_width(size, error, message):
    pipe = tiny_sd()
    gspn.swap(pipe, segment=4, init="random")
    with pytest.raises(error, match=message):
        gspn.adapt(pipe, size)


def test_a_size_may_be_of_numpy():
    pipe = tiny_sd()
    swapped = gspn.swap(pipe, segment=4, init="random")
    with gspn.adapt(pipe, tuple(np.array([32, 16]))):
        assert {layer.apart for layer in swapped.layers.values()} == {(2, 1)}


def test_an_adapted_unet():
    unet = unet_of()
    with pytest.raises(ValueError, match="not swapped"):
        gspn.adapt(unet, (16, 16))
    with gspn.swap(unet, init="random"), pytest.raises(ValueError, match="global"):
        gspn.adapt(unet, (16, 16))
    gspn.swap(unet, segment=2, init="random")
    before = run(unet, 16, 16)
    with gspn.adapt(unet, (16, 16)):  # of its input
        within = run(unet, 16, 16)
        assert within.shape == before.shape and (within - before).abs().max() > 1e-4
    assert torch.equal(run(unet, 16, 16), before)
    unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="no sample_size"):
        gspn.adapt(unet, (16, 16))
