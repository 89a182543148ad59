"""A swap in the UNets of SD-1.5, SD-2.1 and SDXL as they were published: every layer's shape, without weights; and the
benchmark of them, rehearsed."""

import json
import math
import sys

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.contenders import stable_diffusion_models
from benchmarks.contenders.stable_diffusion_models import CONTENDERS, PUBLISHED, THREE
from benchmarks.speed import stable_diffusion, stable_diffusion_report

# name of a block: swapped layers, channels, and by how much its map is smaller than the latents
SD = {
    "down_blocks.0": (2, 320, 1),
    "down_blocks.1": (2, 640, 2),
    "down_blocks.2": (2, 1280, 4),
    "mid_block": (1, 1280, 8),
    "up_blocks.1": (3, 1280, 4),
    "up_blocks.2": (3, 640, 2),
    "up_blocks.3": (3, 320, 1),
}
BLOCKS = {
    "SD-1.5": SD,
    "SD-2.1": SD,
    "SDXL": {
        "down_blocks.1": (4, 640, 2),
        "down_blocks.2": (20, 1280, 4),
        "mid_block": (10, 1280, 4),
        "up_blocks.0": (30, 1280, 4),
        "up_blocks.1": (6, 640, 2),
    },
}


def added_by(form: str, channels: int) -> int:
    """Parameters that a layer has more than the attention without biases in to_q, to_k and to_v: 4 C^2 + C."""
    c, directions = channels, 4
    attention = 4 * c * c + c
    if form == "GSPN pure":  # the proxy, projections to weights, input, output and skip gates, merger, to_out
        s = c // 8
        return s * c + directions * (3 + 1 + 1 + 1) * c * s + directions + c * c + c - attention
    s = c // 32  # three proxies, the same projections with biases, merger; to_q, to_k, to_v and to_out as they were
    return 3 * s * c + directions * (3 + 1 + 1 + 1) * (c * s + c) + directions


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "SDXL" else []) for name in PUBLISHED]
)
def test_every_layer_is_swapped_and_sees_its_map_at_every_aspect_ratio(name):
    found = stable_diffusion_models.structure(name)
    assert found["parameters"]["attention"] == found["published"] == PUBLISHED[name]
    blocks = {}
    for layer in found["layers"]:
        blocks.setdefault(layer["name"].split(".attentions")[0], []).append(layer)
        for contender in THREE[1:]:
            more = layer["parameters"][contender] - layer["parameters"]["attention"]
            assert more == added_by(contender, layer["channels"])
    assert {block: len(layers) for block, layers in blocks.items()} == {b: v[0] for b, v in BLOCKS[name].items()}
    for block, (_, channels, smaller) in BLOCKS[name].items():
        for layer in blocks[block]:
            assert layer["channels"] == channels
            for size, seen in layer["maps"].items():
                # each halving rounds up; that is rounding up once
                assert seen == [math.ceil(int(side) / 8 / smaller) for side in size.split("x")], (layer["name"], size)
    for contender in THREE[1:]:
        more = sum(added_by(contender, layer["channels"]) for layer in found["layers"])
        assert found["parameters"][contender] == PUBLISHED[name] + more


@pytest.mark.slow
def test_counted_operations_and_memory_grow_as_they_should():
    unets = stable_diffusion_models.contenders(stable_diffusion_models.build("toy"), THREE)
    small, large = (stable_diffusion_models.step(unets, size) for size in ((1024, 1024), (4096, 2048)))
    counts = {n: (small[n]["operations"], large[n]["operations"]) for n in small}
    for name in THREE[1:]:
        assert counts[name][1] == pytest.approx(8 * counts[name][0], rel=1e-2)
        assert counts["attention"][0] > counts[name][0] and counts["attention"][1] > 5 * counts[name][1]
    # what attention does beyond growing with the pixels is two products of all pairs, 4 C N^2 in each layer and half
    layers, channels, places = 12, 16, (1024 // 16) ** 2
    pairs = 2 * layers * 4 * channels * places**2
    assert counts["attention"][1] == pytest.approx(8 * counts["attention"][0] + (8**2 - 8) * pairs, rel=1e-3)
    for name in small:  # attention too: without a matrix of all pairs
        assert large[name]["mib"] == pytest.approx(8 * small[name]["mib"], rel=2e-2) and small[name]["mib"] > 1


def test_contenders_share_weights_and_savers_do_not_change_the_step():
    unet = stable_diffusion_models.build("toy", "cpu", torch.float32)
    unets = stable_diffusion_models.contenders(unet, CONTENDERS)
    shared = {p.data_ptr() for p in unet.parameters()}
    own = {n: sum(p.numel() for p in u.parameters() if p.data_ptr() not in shared) for n, u in unets.items()}
    whole = stable_diffusion_models.parameters(unet)
    assert own["attention"] == 0 and all(0 < own[name] < 0.2 * whole for name in THREE[1:])
    torch.manual_seed(1)
    together = stable_diffusion.steps(unets, (128, 192), apart=False)
    torch.manual_seed(1)
    apart = stable_diffusion.steps(unets, (128, 192), apart=True)
    results = {name: (together[name](), apart[name]()) for name in unets}
    for one, other in results.values():
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results["attention"][0], results["GSPN pure"][0], atol=1e-3)
    assert not torch.allclose(results["GSPN pure, segment 4"][0], results["GSPN pure"][0], atol=1e-5)


def times(name, factor, sizes=((512, 512), (1024, 1024), (2048, 2048))):
    return {f"{h}x{w}": {name: {"ms": [0, factor(h * w), 0]}} for h, w in sizes}


def test_times_are_extrapolated_by_the_laws_that_they_follow():
    attention = times("attention", lambda n: 2 + 3e-5 * n + 2e-10 * n * n)
    ours = times("GSPN pure", lambda n: 5 + 4e-5 * n)
    n = 8192 * 8192
    predicted = stable_diffusion_report.predicted
    assert predicted(attention, "attention", n) == pytest.approx(2 + 3e-5 * n + 2e-10 * n * n, rel=1e-4)
    assert predicted(ours, "GSPN pure", n) == pytest.approx(5 + 4e-5 * n, rel=1e-6)
    assert predicted(times("GSPN pure", lambda n: 1e-5 * n - 1), "GSPN pure", n) > 0  # no negative constant
    assert predicted({}, "attention", n) is None and predicted(dict(list(ours.items())[:2]), "GSPN pure", n) is None
    assert stable_diffusion_report.growth(times("attention", lambda n: n**1.5))["attention"] == {
        "all": 1.5,
        "last": 1.5,
    }
    rows = {size: attention[size] | ours[size] for size in attention}
    kept, left, expected = stable_diffusion.without_the_slow(dict.fromkeys(THREE[:2]), rows, (8192, 8192), 100)
    assert set(kept) == {"GSPN pure"} and expected == pytest.approx((5 + 4e-5 * n) / 1e3)
    assert set(left) == {"attention"} and "not measured" in left["attention"]["why"]
    # what follows from other sizes only is marked, and so is a speed-up that rests on it
    rows["8192x8192"] = left
    time, _ = stable_diffusion_report._cells(rows, "8192x8192", "attention")
    assert time.startswith("~") and stable_diffusion_report._cells(rows, "8192x8192", "GSPN pure")[1].startswith("~")
    assert not stable_diffusion_report._cells(rows, "512x512", "attention")[0].startswith("~")


@pytest.mark.slow
def test_the_benchmark_is_rehearsed_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    command = ["stable_diffusion", "speed", "--rehearse", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--sizes", "64", "128x96"])
    stable_diffusion.main()
    path = tmp_path / "stable-diffusion-gpu.json"
    first = json.loads(path.read_text())["sections"]["step"]
    assert list(first) == ["64x64", "128x96"] and all(set(CONTENDERS) <= set(row) for row in first.values())
    assert "savers" in first["128x96"] and "savers" not in first["64x64"]
    assert (
        path.with_suffix(".png").stat().st_size > 10_000 and "NOT A MEASUREMENT" in path.with_suffix(".md").read_text()
    )
    monkeypatch.setattr(sys, "argv", [*command, "--sizes", "64", "80", "--resume"])
    stable_diffusion.main()
    second = json.loads(path.read_text())["sections"]["step"]
    assert second["64x64"] == first["64x64"] and second["128x96"] == first["128x96"] and "80x80" in second


@pytest.mark.parametrize("size", ["1000x616", "32", "64x64x64"])
def test_sizes_that_cannot_be_are_refused(size, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stable_diffusion", "speed", "--sizes", size])
    with pytest.raises(SystemExit):
        stable_diffusion.main()
    told = capsys.readouterr().err
    assert "multiples of 16" in told and repr(size) in told
