"""Looking into the trained layers of the study: figures by hand, and replacements against what they stand for."""

import math

import pytest
import torch

pytest.importorskip("matplotlib")

from safetensors.torch import load_file

import gspn
from benchmarks.quality.mixers import analyse, contenders, inside, report, study, tasks
from benchmarks.quality.mixers.study import Run

COUNTS = {"figures": 4, "growth": 2, "test": 8, "largest": 4}


@pytest.fixture
def task():
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=source)
    labels = torch.arange(20) % 10
    return tasks.Classes(tasks.Photos({split: (pixels, labels) for split in ("train", "val", "test")}))


@pytest.fixture
def call():
    """Three photos, four channels in two groups, six places by five lines or the other way round."""
    torch.manual_seed(0)
    x, proxy = torch.randn(3, 4, 6, 5), torch.randn(3, 2, 6, 5)
    projections = (torch.randn(4, 3, 2, 2), torch.randn(4, 4, 2), torch.randn(4, 4, 2), torch.randn(4, 2))
    return inside.Call(x, proxy, *projections, [0, 1, 2, 3], None, 256, None, "")


def test_the_calls_are_those_of_the_blocks():
    model = contenders.backbone("gspn-global", "bare", 10, True, seed=0)
    outputs = []
    for block in model.blocks:
        block.mixer.scan.register_forward_hook(lambda module, args, output: outputs.append(output))
    x = torch.randn(3, 3, 12, 8)
    calls = inside.calls_of(model, [x[:2], x[2:]])
    for i, found in enumerate(calls):
        assert torch.allclose(found(), torch.cat([outputs[i], outputs[i + contenders.DEPTH]]), atol=1e-5)


@pytest.mark.parametrize("name", ["none", "gspn-forget"])
def test_mixers_that_do_not_propagate_are_refused(name):
    with pytest.raises(ValueError, match="got 0 for 1 batches"):
        inside.calls_of(contenders.backbone(name, "bare", 10, True, seed=0), [torch.randn(1, 3, 4, 4)])


def test_a_pass_is_the_scan_turned_to_the_right(call):
    for i, direction in enumerate(gspn.DIRECTIONS):
        gate, logits = (inside.project(p[i], call.proxy) for p in (call.input_proj, call.weight_proj))
        logits = logits.transpose(1, 2)
        state = gspn.gated_scan(call.x, gate[:, None], logits[:, None], directions=[direction])[:, 0]
        found = inside.one_pass(call, i)
        assert torch.allclose(found.state, inside.turned(state, i), atol=1e-5)
        weights = inside.turned(gspn.normalize_weights(logits, direction=direction), i)
        assert torch.allclose(found.weights, weights, atol=1e-6)


@pytest.mark.parametrize("segment", [None, 2])
def test_the_passes_of_a_centred_call_make_its_output(call, segment):
    call = call._replace(segment=segment, center=gspn.layers.input_means(call.x, call.proxy, call.input_proj))
    expected = inside.project(call.skip_proj, call.proxy) * call.x
    for i in call.directions:
        found = inside.one_pass(call, i)
        part = found.output_gate * found.state
        part = part.flip(-1) if i >= 2 else part
        expected = expected + (part if i % 2 == 0 else part.transpose(-1, -2))
    torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)


def test_deviations_over_pixels_and_images_apart():
    """Images of -1 and 1 in turn have a deviation of 1; those of 2 and 6, constant, have one of 2 around 4."""
    maps = torch.tensor([-1.0, 1.0]).repeat(2, 1, 3, 2)
    assert inside.spread(maps) == {"std": 1.0, "pixels": 1.0, "images": 0.0, "mean": 0.0}
    maps = torch.tensor([2.0, 6.0]).view(2, 1, 1, 1).expand(2, 1, 3, 4)
    assert inside.spread(maps) == {"std": 2.0, "pixels": 0.0, "images": 2.0, "mean": 4.0}


def test_share_of_the_input():
    fixed = torch.tensor([0.2, 0.5, 0.3]).view(1, 1, 3, 1, 1).expand(2, 1, 3, 4, 4)
    assert inside.share_of_input(fixed, 1 / 3) == pytest.approx(0, abs=1e-12)
    # 1/3 give or take 0.1 by the photo: all of it; half of the second moment where the mean is 0.1 off as well
    moved = 1 / 3 + torch.tensor([0.1, -0.1]).view(2, 1, 1, 1, 1).expand(2, 1, 3, 4, 4)
    assert inside.share_of_input(moved, 1 / 3) == pytest.approx(1)
    assert inside.share_of_input(moved + 0.1, 1 / 3) == pytest.approx(0.5, rel=1e-5)


def _weights(values, places=9, lines=4):
    return torch.tensor(values).view(1, 1, 3, 1, 1).expand(1, 1, 3, places, lines).contiguous()


def test_influence_of_thirds_and_of_a_ray():
    found = inside.influence(_weights([1 / 3, 1 / 3, 1 / 3]), None)
    # n steps of -1, 0, 1: variance 2n/3; after two the places have 1, 2, 3, 2, 1 ninths
    assert found["spread"] == pytest.approx([0, *(math.sqrt(2 * n / 3) for n in (1, 2, 3))], abs=1e-3)
    assert found["kept"][:3] == pytest.approx([1, 1 / 3, 19 / 81], rel=1e-5)
    assert found["drift"] == pytest.approx([0] * 4, abs=1e-5)
    found = inside.influence(_weights([1.0, 0.0, 0.0]), None)
    assert found["drift"] == [0, 1, 2, 3] and found["kept"] == [1, 1, 1, 1] and found["spread"] == [0, 0, 0, 0]
    assert found["drift by input"] == [0, 0, 0, 0]
    # with segments of three lines the fourth line starts anew
    assert inside.influence(_weights([1.0, 0.0, 0.0]), 3)["kept"] == [1, 0, 0, 0]


def test_leverage_by_hand():
    """One photo takes the state from the place before, the other from the place after; these hold 0 and 6."""
    state = torch.tensor([[0.0, 0], [3, 0], [6, 0]]).expand(2, 1, 3, 2)
    weights = torch.zeros(2, 1, 3, 3, 2)
    weights[0, :, 0], weights[1, :, 2] = 1, 1
    gated = torch.full((2, 1, 3, 2), 2.0)
    found = inside.leverage(inside.Pass(None, weights, None, None, gated, state))
    assert found["chosen"] == pytest.approx(3 / 2)  # the mean weights 1/2, 0, 1/2 give 3, the photos' own 0 and 6
    assert found["choice"] == {"1": pytest.approx(math.sqrt(6 / 15))}  # 3, 0, 3 of 0, 3, 6
    assert found["neighbours"] == pytest.approx(1.5 / torch.tensor([0.0, 3, 6, 0, 0, 0]).std(correction=0).item())
    same = inside.leverage(inside.Pass(None, weights[:1].repeat(2, 1, 1, 1, 1), None, None, gated, state))
    assert same["chosen"] == 0


def test_states_further_apart():
    """A line of 0, 1, 2, 3, 4: places 2 apart around the middle hold 0, 2, 4."""
    state = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 1, 5, 2)
    assert inside.three_states(state, 2).flatten().tolist() == [0, 2, 4]
    assert inside.three_states(state)[0, 0, :, :, 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


def _parts(call):
    """Weights of each direction, and gates."""
    weights = torch.stack(
        [
            gspn.normalize_weights(inside.project(p, call.proxy).transpose(1, 2), direction=direction)
            for p, direction in zip(call.weight_proj, gspn.DIRECTIONS, strict=True)
        ],
        1,
    )
    names = ("input gate", "output gate", "skip gate")
    return {"weights": weights} | {n: inside.project(getattr(call, inside.PARTS[n]), call.proxy) for n in names}


@pytest.mark.parametrize("part", inside.PARTS)
def test_a_replaced_part_and_no_other(call, part):
    usual, means = _parts(call), inside.means(call)
    constant, other = _parts(inside.with_mean(call, part, means)), _parts(inside.of_another_photo(call, part))
    for name, value in usual.items():
        if name != part:
            assert torch.allclose(constant[name], value, atol=1e-5) and torch.allclose(other[name], value, atol=1e-5)
    assert torch.allclose(other[part], usual[part].roll(1, 0), atol=1e-5)
    if part != "weights":
        assert torch.allclose(constant[part], usual[part].mean((0, -2, -1), keepdim=True).expand_as(usual[part]))
        return
    # lines of "right" are columns: without the first and last row all three neighbours exist
    expected = usual[part][:, 0, ..., 1:-1, :].mean((0, -2, -1), keepdim=True)
    inner = constant[part][:, 0, ..., 1:-1, :]
    assert torch.allclose(inner, expected.expand_as(inner), atol=1e-5)
    first = expected[..., 0, 0][0, :, 1:] / expected[..., 0, 0][0, :, 1:].sum(-1, keepdim=True)
    assert torch.allclose(constant[part][0, 0, :, 1:, 0, 0], first, atol=1e-5)


def test_a_centred_call_stays_centred(call):
    """Its mean is that of the input gate that it has after a replacement."""
    mean_of = lambda call: gspn.layers.input_means(call.x, call.proxy, call.input_proj)  # noqa: E731
    centred, means = call._replace(center=mean_of(call)), inside.means(call)
    for replace in (inside.with_mean(centred, "input gate", means), inside.of_another_photo(centred, "input gate")):
        assert torch.equal(replace.center, mean_of(replace)) and not torch.allclose(replace.center, centred.center)
    other = inside.with_mean(centred, "weights", means)
    assert torch.allclose(other.center, centred.center, atol=1e-6)
    levers = inside.levers(centred)
    assert levers["as it is"] == pytest.approx(levers["as it is, centred"], rel=1e-4)


def test_parts_that_are_taken_out(call):
    means = inside.means(call)
    run = {name: replace(call, means)() for name, replace in inside.REPLACEMENTS.items()}
    skip = inside.project(call.skip_proj, call.proxy) * call.x
    assert torch.allclose(run["no scan"], skip, atol=1e-5)
    assert torch.allclose(run["no skip"] + skip, run["nothing"], atol=1e-4)
    assert torch.allclose(run["only along rows"] + run["only along columns"] - skip, run["nothing"], atol=1e-4)
    rows = call._replace(output_proj=call.output_proj[::2], weight_proj=call.weight_proj[::2], directions=[0, 2])
    assert torch.allclose(run["only along rows"], rows._replace(input_proj=call.input_proj[::2])(), atol=1e-4)
    changes = inside.output_changes(call, means)
    assert changes["nothing"] == 0
    assert changes["no skip"] == pytest.approx(inside.rms(skip) / inside.rms(run["nothing"]), rel=1e-4)


def test_levers(call):
    """Weights that do not depend on the input move nothing; a level moves softmax weights, a mean taken once does not
    move them but what they are compared with."""
    found = inside.levers(call)
    usual, mean = call(), inside.with_mean(call, "weights", inside.means(call))()
    assert found["as it is"] == pytest.approx(inside.rms(mean - usual) / inside.rms(usual), rel=1e-4)
    once = call._replace(center=gspn.layers.input_means(call.x, call.proxy, call.input_proj))
    ratio = found["as it is, centred"] / found["as it is"]
    assert ratio == pytest.approx(inside.rms(usual) / inside.rms(once()), rel=1e-4)
    low = inside.one_pass(inside.at_level(call, -14.0, 2.0), 0)
    logits = 2 * inside.one_pass(call, 0).logits
    assert torch.allclose(inside.inner(low.weights), inside.inner(logits.softmax(2)), atol=2e-3)  # 1 - s is not quite 1
    assert max(inside.levers(inside.thirds(call)).values()) < 1e-5


def test_gradients_of_equal_batches_agree_fully(task):
    model = contenders.backbone("gspn-g8", "bare", 10, True, seed=0)
    batch = next(iter(task.batches(0, 1, 4)))
    task.batches = lambda seed, steps, size: iter([batch] * steps)
    found = analyse.gradients(model, task, 0, 2, 4)
    projection = model.blocks[1].mixer.input_proj
    (gradient,) = torch.autograd.grad(task.loss(model, batch), projection)
    size = gradient.norm().item()
    assert found["1.input_proj"]["agreement"] == pytest.approx(1, rel=1e-4)
    assert found["1.input_proj"]["relative"] == pytest.approx(size / projection.norm().item(), rel=1e-4)
    assert found["1.input_proj"]["element"] == pytest.approx(size / (4 * 64 * 8) ** 0.5, rel=1e-4)
    assert len(found) == 4 * contenders.DEPTH


def test_how_far_projections_moved():
    start, end = (contenders.backbone("gspn-global", "bare", 10, True, seed=0) for _ in range(2))
    with torch.no_grad():
        end.blocks[2].mixer.scan.weight_proj *= 1.5
    found = analyse.moved(start, end)
    assert found["2.weight_proj"] == pytest.approx(0.5) and found["2.input_proj"] == 0


def test_a_model_is_trained_kept_and_looked_into(task, tmp_path):
    """The second time it is opened; what it reaches with nothing replaced is what training measured."""
    run = Run("classes", "bare", "gspn-g8", 3e-3, 0, 1)
    few = {"look": 4, "val": 4, "test": 8, "setting": 4}
    content = study.train(run, task, few, models=tmp_path)
    file = tmp_path / f"{run.stem}.safetensors"
    before = file.read_bytes()
    found = analyse.look_into(run, task, tmp_path, COUNTS, batches=1, batch_size=4)
    assert file.read_bytes() == before
    for setting in ("1", "2"):
        assert found["replaced"][setting]["nothing"]["loss"] == pytest.approx(content["test"][setting]["loss"])
    assert found["moved"]["0.weight_proj"] > 0 and len(load_file(file)) > 50
    assert len(found["blocks"][0]["state by line, largest"]["up"]) == 32
    file.unlink()
    _, trained = analyse.open_model(run, task, tmp_path)  # trains it again, in the same way
    assert file.read_bytes() == before and not trained.training

    stem = tmp_path / "report"
    usual = found["replaced"]["1"]["nothing"]["loss"]
    found["replaced"]["1"]["weights are 1/3"] |= {"accuracy": 0.427, "loss": usual + 0.25}
    text = report.report({}, stem, inside={"classes-bare": {"gspn-g8": found}})
    assert "| weights are 1/3 | 42.7 (+0.250) |" in text and (tmp_path / "report-inside-classes-bare.png").exists()
    mean = sum(block["x"]["std"] for block in found["blocks"]) / contenders.DEPTH
    assert f"| x, deviation | {mean:.3g} (" in text


def test_weights_that_do_not_depend_on_the_input_are_refused(task, tmp_path, monkeypatch):
    model = contenders.backbone("gspn-normed-thirds", "bare", 10, True, seed=0)
    monkeypatch.setattr(analyse, "open_model", lambda *arguments: (model, model))
    with pytest.raises(ValueError, match="gspn-normed-thirds"):
        analyse.look_into(Run("classes", "bare", "gspn-normed-thirds", 3e-3, 0, 1), task, tmp_path)
