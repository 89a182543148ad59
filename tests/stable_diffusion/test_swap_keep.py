"""Attentions that stay in a swap: which they are, that they are saved and loaded, what ranks them."""

import json

import numpy as np
import pytest
import torch
from helpers.swapping import assert_same_state, inputs, run, state_of, unet_of
from safetensors import safe_open
from safetensors.torch import save_file

import gspn
from gspn.stable_diffusion import rank
from gspn.stable_diffusion.keeping import level_of

LOW = {"mid_block.attentions.0", "down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"}
HIGH = {"down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"}
ATTN = ".transformer_blocks.0.attn1"


def names(places):
    return {place + ATTN for place in places}


@pytest.mark.parametrize(
    "keep, kept",
    [
        (None, set()),
        ((), set()),
        ("lowest", LOW),
        ("level:1", LOW),
        ("level:0", HIGH),
        ("mid_block", {"mid_block.attentions.0"}),
        ("mid_block.attentions.0" + ATTN, {"mid_block.attentions.0"}),
        ("up_blocks.?.attentions.1.*", {"up_blocks.0.attentions.1", "up_blocks.1.attentions.1"}),
        (["mid_block", "down_blocks.0"], {"mid_block.attentions.0", "down_blocks.0.attentions.0"}),
    ],
)
def test_what_stays(keep, kept, tmp_path):
    unet = unet_of()
    before, attentions = state_of(unet), dict(unet.named_modules())
    with gspn.swap(unet, keep=keep, init="random") as swapped:
        assert set(swapped.kept) == names(kept) and set(swapped.layers) == names(LOW | HIGH) - names(kept)
        for name in names(LOW | HIGH):
            assert (unet.get_submodule(name) is attentions[name]) == (name in names(kept))
        expected = run(unet)
        assert (f"kept={len(kept)}" in repr(swapped)) == bool(kept)
        file = swapped.save(tmp_path)
    assert_same_state(unet, before)
    with safe_open(file, "pt") as saved:
        assert ("kept" in json.loads(saved.metadata()["gspn_swap"])) == bool(kept)
        assert not any(key.startswith(name) for key in saved.keys() for name in names(kept))
    other = unet_of()
    loaded = gspn.load_swap(other, tmp_path)
    assert loaded.kept == swapped.kept and torch.equal(run(other), expected)
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_levels_are_those_of_the_map():
    unet = unet_of("sdxl")  # no attention in the highest level
    with gspn.swap(unet) as swapped:
        assert {level_of(unet, name) for name in swapped.layers} == {1}
    with pytest.raises(ValueError, match=r"level:0.* matches none of the .*at level:1"):
        gspn.swap(unet, keep="level:0")


def test_a_number_may_be_one_of_numpy():
    with pytest.raises(ValueError, match=r"from 1 to 6, of 7 .*got 7"):
        gspn.swap(unet_of(), keep=np.int64(7))


@pytest.mark.parametrize(
    "keep, error, message",
    [
        ("attn2", ValueError, "'attn2' matches none of the 7 .*such as down_blocks.0"),
        (["lowest", "level:7"], ValueError, "'level:7' matches none.*level:0, level:1"),
        ("*", ValueError, "all 7 self-attentions would stay"),
        ("level:x", ValueError, "'level:x'"),
        ([1], TypeError, "got 1"),
        (2.5, TypeError, "got 2.5"),
        (True, TypeError, "got True"),
        (7, ValueError, "from 1 to 6, of 7 .*got 7"),
        (0, ValueError, "from 1 to 6, .*got 0"),
        (2, ValueError, "keep=2 .*needs run"),
    ],
)
def test_what_cannot_stay_is_told_and_the_unet_stays_as_it_was(keep, error, message):
    unet = unet_of()
    before = state_of(unet)
    with pytest.raises(error, match=message):
        gspn.swap(unet, keep=keep)
    assert_same_state(unet, before)


def test_attentions_go_back_later_too():
    unet = unet_of()
    attention = unet.get_submodule("mid_block.attentions.0" + ATTN)
    swapped = gspn.swap(unet, init="random")
    swapped.keep("mid_block")
    assert unet.get_submodule("mid_block.attentions.0" + ATTN) is attention and len(swapped.layers) == 6
    assert swapped.active == "gspn" and run(unet).isfinite().all()
    whole = gspn.swap(unet_of(), keep="mid_block", init="random")
    for name, layer in whole.layers.items():
        layer.load_state_dict(swapped.layers[name].state_dict())
    assert torch.equal(run(unet), run(whole.unet))
    with pytest.raises(ValueError, match="matches none of the 6"):
        swapped.keep("mid_block")
    with pytest.raises(TypeError, match="no number, got 2"):
        swapped.keep(2)
    gspn.restore(unet)
    with pytest.raises(ValueError, match="was restored"):
        swapped.keep("lowest")


def test_the_rank_is_the_error_of_the_output():
    """With one layer at a time, and the attention everywhere else."""
    unet = unet_of()
    swapped = gspn.swap(unet, init="random")
    errors = rank(swapped, lambda: run(unet), maps=4)  # two runs of two inputs
    assert list(errors.values()) == sorted(errors.values(), reverse=True) and set(errors) == set(swapped.layers)
    states = {name: layer.state_dict() for name, layer in swapped.layers.items()}
    gspn.restore(unet)
    wanted = run(unet)
    for name, error in errors.items():
        with gspn.swap(unet, keep=[other for other in errors if other != name], init="random") as alone:
            alone.layers[name].load_state_dict(states[name])
            found = (run(unet) - wanted).norm() / wanted.norm()
        assert error == pytest.approx(found.item(), rel=1e-4) and error > 1e-4


def test_the_rank_is_that_of_the_inputs_at_the_time():
    """A run may write into its own tensors afterwards, and into the output."""
    unet = unet_of()
    swapped = gspn.swap(unet, init="random")
    expected = rank(swapped, lambda: run(unet), maps=2)

    def careless():
        given = inputs(unet)
        with torch.no_grad():
            unet(**given).sample.zero_()
        given["sample"].mul_(3)
        given["encoder_hidden_states"].zero_()

    assert rank(swapped, careless, maps=2) == pytest.approx(expected, rel=1e-5)


def test_the_rank_is_that_of_an_adapters_residuals_too():
    """Whose list the UNet empties."""
    unet = unet_of()
    swapped = gspn.swap(unet, init="random")
    given, seen = [], []

    def adapted():
        given.append([torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4)])
        run(unet, down_intrablock_additional_residuals=list(given[0]))

    hook = unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(list(kwargs["down_intrablock_additional_residuals"])), with_kwargs=True
    )
    rank(swapped, adapted, maps=2)
    hook.remove()
    assert len(seen) == 2 + len(swapped.layers)
    for residuals in seen:
        assert all(torch.equal(a, b) for a, b in zip(residuals, given[0], strict=True))


def test_what_cannot_be_ranked_is_told():
    unet = unet_of()
    swapped = gspn.swap(unet, init="random")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        rank(swapped, lambda: run(unet), maps=0)
    name, layer = next(iter(swapped.layers.items()))
    with torch.no_grad():
        layer.to_out[0].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=f"not finite with {name}"):
        rank(swapped, lambda: run(unet))
    assert swapped.active == "gspn" and not swapped.attentions[name]._forward_hooks and not unet._forward_hooks


def test_a_number_keeps_those_whose_replacement_costs_most(monkeypatch):
    unet = unet_of()
    calls = []
    monkeypatch.setattr("gspn.stable_diffusion.swap.fit", lambda swapped, run: calls.append("fit"))
    swapped = gspn.swap(unet, keep=2, run=lambda: run(unet))
    gspn.restore(unet)
    errors = rank(gspn.swap(unet), lambda: run(unet))
    assert calls == ["fit"] and set(swapped.kept) == set(list(errors)[:2])


def test_a_run_that_fails_leaves_the_unet_as_it_was():
    unet = unet_of()
    before = state_of(unet)
    with pytest.raises(ZeroDivisionError):
        gspn.swap(unet, keep=2, run=lambda: 1 / 0)
    assert_same_state(unet, before)
    with pytest.raises(ValueError, match="did not run the UNet"):
        gspn.swap(unet, keep=2, run=lambda: None)
    assert_same_state(unet, before)
    with pytest.raises(ValueError, match="run is for a number"):
        gspn.swap(unet, keep="lowest", run=lambda: None)


def test_a_file_whose_kept_do_not_fit_is_refused(tmp_path):
    unet = unet_of()
    with gspn.swap(unet, keep="mid_block") as swapped:
        file = swapped.save(tmp_path)
    before = state_of(unet)
    with safe_open(file, "pt") as saved:
        config = json.loads(saved.metadata()["gspn_swap"])
        tensors = {key: saved.get_tensor(key) for key in saved.keys()}
    for kept, message in (([], "not where"), (["mid_block"], "not where"), ("mid_block", "damaged")):
        save_file(tensors, file, {"gspn_swap": json.dumps(config | {"kept": kept})})
        with pytest.raises(ValueError, match=message):
            gspn.load_swap(unet, tmp_path)
        assert_same_state(unet, before)


def test_inputs_of_a_kept_attention_are_its_own(caplog):
    """The size of the map, which the layers get, does not reach diffusers' attention, which would warn of it."""
    unet = unet_of()
    gspn.swap(unet, keep="lowest")
    seen = []
    unet.get_submodule("mid_block.attentions.0" + ATTN).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    unet(**inputs(unet))
    assert seen and all("map_size" not in kwargs for kwargs in seen)
