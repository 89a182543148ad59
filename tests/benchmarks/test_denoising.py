"""The comparison of denoisers: equal models, equal data, a runner that does what is missing, a report."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("matplotlib")

from benchmarks.quality import denoising
from benchmarks.quality.denoising import CONTENDERS, RATES, SEEDS, Run
from benchmarks.quality.denoising_blocks import ConvNeXtBlock, DiCoBlock
from benchmarks.quality.mixers.tasks import Photos
from gspn.tasks.objective import Objective, make_scheduler


@pytest.fixture
def photos():
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=source)
    return Photos({split: (pixels, torch.arange(40) % 10) for split in ("train", "val", "test")})


def test_all_models_have_as_many_parameters():
    for name, contender in CONTENDERS.items():
        parameters = sum(p.numel() for p in contender.make().parameters())
        assert abs(parameters / 318_000 - 1) < 0.05, name


@pytest.mark.parametrize("name", ["ours-attention", "ours-attention-positions", "dico", "convnext"])
def test_all_start_as_dit_does(name):
    """Xavier's weights, whose deviation is sqrt(2 / (in + out)), and no bias; what modulates starts at 0."""
    for path, module in CONTENDERS[name].make().blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            wanted = 0 if path.endswith("modulation") else (2 / (module.in_features + module.out_features)) ** 0.5
            assert module.weight.std().item() == pytest.approx(wanted, rel=0.1), path
            assert not module.bias.any(), path


@pytest.mark.parametrize(("block", "tensors"), [(ConvNeXtBlock, 3), (DiCoBlock, 6)])
def test_convolutional_blocks_start_as_nothing_and_hear_the_condition(block, tensors):
    torch.manual_seed(0)
    block, x, c = block(8, 2.0), torch.randn(2, 5, 7, 8), torch.randn(2, 8)
    assert torch.equal(block(x, c), x)
    torch.nn.init.normal_(block.modulation.weight)
    assert block.modulation.weight.shape == (8 * tensors, 8)
    assert (block(x, c) - x).abs().mean() > 0.1 and not torch.allclose(block(x, c), block(x, -c))


def test_dico_s_channel_attention():
    """Against the formula: each channel times the sigmoid of a projection of the means over the map."""
    torch.manual_seed(0)
    block, x = DiCoBlock(4, 2.0), torch.randn(2, 5, 7, 4)
    block.modulation.bias.data[8:12] = 1.0  # the first gate: the second half of the block stays off
    inner = block.inner(F.layer_norm(x, (4,), eps=1e-6)).permute(0, 3, 1, 2)
    y = F.gelu(F.conv2d(inner, block.depthwise.weight, block.depthwise.bias, padding=1, groups=4))
    weight = torch.sigmoid(block.attention(y.mean((2, 3))))
    wanted = x + block.outer((y * weight[:, :, None, None]).permute(0, 2, 3, 1))
    torch.testing.assert_close(block(x, torch.zeros(2, 4)), wanted, rtol=1e-4, atol=1e-4)


def test_smaller_images_get_a_margin_and_folders_of_classes_are_shuffled(tmp_path):
    for split, count in (("train", 30), ("test", 2)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (28, 28), 100).save(tmp_path / split / label / f"{i}.png")
    opened = denoising.open_images(tmp_path)
    assert {split: len(labels) for split, (_, labels) in opened.splits.items()} == {"train": 54, "val": 6, "test": 4}
    assert set(opened["val"][1].tolist()) == {0, 1}
    images = opened["train"][0]
    assert images.shape == (54, 1, 32, 32)
    assert (images[:, :, 2:30, 2:30] == 100).all() and images.sum() == 54 * 28 * 28 * 100
    Image.new("L", (40, 28)).save(tmp_path / "test" / "a" / "0.png")
    for label in ("a", "b"):
        for i in range(30):
            Image.new("L", (40, 28)).save(tmp_path / "train" / label / f"{i}.png")
    with pytest.raises(ValueError, match="expected images of at most 32x32, got 28x40"):
        denoising.open_images(tmp_path)


def test_each_image_has_its_own_margin_and_ten_are_needed(tmp_path):
    sizes = {"train": [(32, 32), (7, 12), *[(20, 31)] * 7], "test": [(4, 6)]}
    for split, each in sizes.items():
        (tmp_path / split / "a").mkdir(parents=True)
        for i, size in enumerate(each):
            Image.new("RGB", size, (1, 1, 1)).save(tmp_path / split / "a" / f"{i}.png")
    with pytest.raises(ValueError, match="has 9 training images; expected 10 or more"):
        denoising.open_images(tmp_path)
    Image.new("RGB", (20, 31), (1, 1, 1)).save(tmp_path / "train" / "a" / "9.png")
    opened = denoising.open_images(tmp_path)
    images = torch.cat([opened["train"][0], opened["val"][0]])
    assert images.shape == (10, 3, 32, 32) and len(opened["val"][0]) == 1
    assert sorted(images[:, 0].sum((1, 2)).tolist()) == [84, *[620] * 8, 1024]
    test = opened["test"][0]
    assert test[:, :, 13:19, 14:18].all() and test.sum() == 3 * 4 * 6


def test_a_folder_of_other_data_or_another_optimizer_is_refused(photos, tmp_path, monkeypatch, capsys):
    def called(*given):
        monkeypatch.setattr("sys.argv", ["denoising", "--out", str(tmp_path), *given])
        denoising.main()

    seen = []
    train = lambda run, **more: seen.append(more) or run._asdict() | {"test": {}, "cpu_ms_per_step": 1}  # noqa: E731
    monkeypatch.setattr(denoising, "train", train)
    monkeypatch.setattr(denoising, "open_images", lambda folder: photos)
    one = ("--photos", "any", "--runs", "contender=ours,rate=0.01,seed=0")
    settings = ("--name", "emoji", "--sizes", "0.75", "1.5", "--optimizer", "muon")
    called(*one, *settings)
    assert seen == [{"photos": photos, "optimizer_name": "muon", "factors": [0.75, 1.5]}]
    (content,) = denoising.read(tmp_path).values()
    assert content["data"] == "emoji"
    file = next(tmp_path.glob("*.json"))
    file.write_text(json.dumps(content | {"optimizer": "muon", "factors": [0.75, 1.5]}))  # as `train` tells
    called(*one, *settings)  # it is done
    other = ("--name", "Fashion-MNIST", *settings[2:])
    for given, told in ((one, "data emoji, expected CIFAR-10"), ((*one, *other), "data emoji, expected Fashion-MNIST")):
        with pytest.raises(SystemExit):
            called(*given)
        assert told in capsys.readouterr().err
    assert len(seen) == 1


def test_at_random_sizes_all_see_the_same_images_classes_and_timesteps(photos, monkeypatch):
    seen, usual = {}, denoising.denoised

    def kept(name):
        def denoised(model, objective, start, noise, t, label):
            if torch.is_grad_enabled():
                seen.setdefault(name, []).append((tuple(start.shape[2:]), (t.tolist(), label.tolist())))
            return usual(model, objective, start, noise, t, label)

        return denoised

    for name in ("ours-sized", "dit"):
        monkeypatch.setattr(denoising, "denoised", kept(name))
        found = denoising.train(Run(name, 0.01, 0, 6), photos, {"32x32": 4}, batch=2, factors=(0.75, 1.5))
        assert found["factors"] == (0.75, 1.5)
    (ours, what), (dit, of_dit) = (zip(*seen[name], strict=True) for name in ("ours-sized", "dit"))
    assert what == of_dit
    assert len(set(ours)) > 3 and len(set(dit)) > 3
    assert all(24 <= side <= 48 and side % 2 == 0 for sides in ours + dit for side in sides)
    assert all(height == width for height, width in dit) and any(height != width for height, width in ours)


def test_what_is_measured(photos):
    """A model that predicts 0 has the loss |v|^2, which is that of the target; one that knows the class is told so."""

    class Known(torch.nn.Module):
        def forward(self, x, timestep, class_labels):
            wrong = (class_labels == 10).float().view(-1, 1, 1, 1)
            return type("", (), {"sample": torch.zeros_like(x) + 2 * wrong})

    objective = Objective(make_scheduler("v_prediction", learn_sigma=False))
    found = denoising.measure(Known(), objective, photos["test"], "32x32", 40)
    assert len(found["each"]) == 40 and found["loss"] == pytest.approx(sum(found["each"]) / 40, abs=1e-5)
    assert 0.3 < found["loss"] < 1.1
    assert found["class_is_worth"] == pytest.approx([4.0] * 5, abs=0.2)  # |v - 2|^2 - |v|^2, as v has a mean near 0
    assert denoising.measure(Known(), objective, photos["test"], "32x32", 40) == found
    assert "each" not in denoising.measure(Known(), objective, photos["test"], "32x64", 4)


@pytest.mark.slow
def test_missing_runs_are_made_and_told(photos, tmp_path, monkeypatch):
    pick = {name: CONTENDERS[name] for name in ("dit", "ours")}
    monkeypatch.setattr(denoising, "CONTENDERS", pick)
    trained = denoising.train
    few = dict(sizes={"32x32": 20, "32x64": 4}, batch=2)
    short = lambda run, **more: trained(run._replace(steps=2), **few, **more) | run._asdict()  # noqa: E731
    monkeypatch.setattr(denoising, "train", short)
    assert denoising.work(tmp_path, photos, 0) == 0
    denoising.work(tmp_path, photos, 60, optimizer="muon")
    done = denoising.read(tmp_path)
    assert {content["optimizer"] for content in done.values()} == {"muon"}
    # each at three rates, one further out where the best one was at the edge, then a second seed
    assert {run for run in done if run.rate in RATES} >= {Run(n, r, SEEDS[0]) for n in pick for r in RATES}
    for name in pick:
        rate = denoising.best_rate(done, name)
        assert Run(name, rate, SEEDS[1]) in done
    assert set(done[Run("dit", RATES[0], SEEDS[0])]["test"]) == {"32x32"}  # squares only
    monkeypatch.setattr(denoising, "SIZES", {"32x32": 20, "32x64": 4})
    text = denoising.report(tmp_path)
    assert "| GSPN-DiT |" in text and "square only" in text and "±" in text
    assert done[Run("dit", RATES[0], SEEDS[0])]["environment"]["commit"][:8] in text
    denoising.draw(tmp_path, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 5_000


def test_a_difference_is_of_the_seeds_that_both_have():
    runs = lambda by_seed: {seed: {"test": {"32x32": {"each": each}}} for seed, each in by_seed.items()}  # noqa: E731
    ours = runs({0: [1.0, 2.0, 3.0], 1: [1.0, 1.0, 1.0], 2: [0.0, 0.0, 0.0]})
    alone, both = runs({1: [2.0, 1.0, 3.0]}), runs({1: [2.0, 1.0, 3.0], 0: [2.0, 2.0, 7.0]})
    assert denoising.differences(ours, alone) == ("+1.0000 ± 0.5774", "")
    # of the photos 1, 0 and 3, of the seeds 5/3 and 1
    assert denoising.differences(ours, both) == ("+1.3333 ± 0.8819", "+1.3333 ± 0.4714")
    assert denoising.differences(ours, runs({5: [0.0, 0.0, 0.0]})) == ("", "")
