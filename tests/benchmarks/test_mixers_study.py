"""The study of mixers: equal backbones, labels that are right, a runner that does what is missing, a report."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")

from benchmarks.harness.study import keep, times
from benchmarks.quality.mixers import contenders, remedies, report, study, tasks, tracing
from benchmarks.quality.mixers.contenders import CONTENDERS, FORMS
from benchmarks.quality.mixers.study import Run

RUNNING = [name for name, contender in CONTENDERS.items() if not contender.why_not]
FEW = {"look": 4, "val": 8, "test": 8, "setting": 4}


@pytest.fixture
def photos(monkeypatch):
    """Each photo has a colour of its own, so that one can tell what comes from where."""
    monkeypatch.setattr(tasks.Tracing, "PAIRS", {"train": 8, "val": 4, "test": 4})  # thousands take a minute
    source = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (40, 3, 1, 1), dtype=torch.uint8, generator=source)
    labels = torch.arange(40) % 10
    return tasks.Photos({split: (colours.expand(-1, -1, 32, 32), labels) for split in ("train", "val", "test")})


@pytest.mark.parametrize("form", FORMS)
def test_all_backbones_have_as_many_parameters(form):
    for name in RUNNING:
        found = contenders.count(contenders.backbone(name, form, 10, True, seed=0))
        assert abs(found / contenders.PARAMETERS - 1) < 0.05, name


@pytest.mark.parametrize("name", RUNNING)
def test_every_contender_takes_odd_sizes_and_trains_all_parameters(name):
    for form in FORMS:
        model = contenders.backbone(name, form, 12, False, seed=0)
        hidden = torch.zeros(2, 5, 9, dtype=torch.bool)
        hidden[:, 2, 3] = True
        y = model(torch.randn(2, 3, 10, 18), hidden)
        assert y.shape == (2, 5, 9, 12)
        y.square().sum().backward()
        for where, parameter in model.named_parameters():
            trained = parameter.grad is not None and parameter.grad.isfinite().all()
            assert trained or not parameter.requires_grad, where


@pytest.mark.parametrize("name", RUNNING)
def test_what_mixes_in_the_bare_form(name):
    """The token in one corner moves that in the opposite one for all but the local mixers, and none moves nothing."""
    model = contenders.backbone(name, "bare", 12, False, seed=0).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    changed = x.clone()
    changed[..., :2, :2] += 1
    with torch.no_grad():
        difference = (model(changed) - model(x)).abs().amax(-1)[0]
    near, far = difference[0, 1], difference[-1, -1]
    assert (near > 0) == (name != "none")
    assert (far > 0) == (name not in ("none", "dw7", "gated-conv", "gspn-local"))


def test_mamba_where_it_can_be_imported():
    """The study does not run it, because it is too slow; it reads the tokens from all four sides."""
    pytest.importorskip("mambapy")
    model = contenders.backbone("mamba", "bare", 12, False, seed=0)
    x = torch.randn(1, 3, 6, 10)
    for row, column in ((0, 0), (0, 4), (2, 0), (2, 4)):
        changed = x.clone()
        changed[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
        with torch.no_grad():
            assert ((model(changed) - model(x)).abs().amax(-1) > 0).all()


def test_same_seed_same_start_and_same_batches(photos):
    first, second, other = (contenders.backbone("dw7", "bare", 10, True, seed) for seed in (3, 3, 4))
    assert torch.equal(first.head.weight, second.head.weight) and not torch.equal(first.head.weight, other.head.weight)
    for kind in tasks.TASKS.values():
        runs = [list(kind(photos).batches(seed, 3, 8)) for seed in (3, 3, 4)]
        assert all(torch.equal(a, b) for x, y in zip(*runs[:2], strict=True) for a, b in zip(x, y, strict=True))
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(runs[0][0], runs[2][0], strict=True))


def test_every_photo_comes_once_before_any_comes_again(photos):
    seen = torch.cat([y for _, y in tasks.Classes(photos).batches(0, 5, 8)])
    assert seen.bincount().tolist() == [4] * 10


@pytest.mark.parametrize("distance", [8, 64])
def test_far_labels_say_whether_the_ends_have_one_colour(photos, distance):
    x, labels = tasks.Far(photos).example(photos["test"][0], distance, torch.Generator().manual_seed(1))
    assert x.shape == (40, 3, 16, 2 * (distance + 8))
    same = (x[:, :, 0, 0] == x[:, :, 0, -1]).all(1)
    assert torch.equal(same.long(), labels) and labels.sum() == 20
    # either label has the same left and right ends in all, so that no end alone tells anything
    apart = labels == 0
    assert torch.allclose(x[apart][:, :, 0, 0].sum(0), x[apart][:, :, 0, -1].sum(0), atol=1e-5)


def test_a_bag_cannot_tell_far_pairs(photos):
    """The sum over tokens of whatever a backbone without mixer makes of them differs by the ends' own part only."""
    model = contenders.backbone("none", "bare", 2, True, seed=0)
    ends = tasks.normalized(photos["test"][0][:2, :, :16, :16])
    task, zero = tasks.Far(photos), torch.zeros(1, 3, 16, 32)

    def logits(left, right):
        return model(torch.cat([ends[left : left + 1], zero, ends[right : right + 1]], -1))

    with torch.no_grad():
        same, apart = logits(0, 0) + logits(1, 1), logits(0, 1) + logits(1, 0)
    assert torch.allclose(same, apart, atol=1e-5) and task.outputs == 2


def test_filling_asks_for_hidden_pixels_and_shows_none_of_them(photos):
    x, hidden, target = next(iter(tasks.Filling(photos).batches(0, 1, 4)))
    assert hidden.shape == (4, 16, 16) and 0.3 < hidden.float().mean() < 0.7
    i, row, column = hidden.nonzero()[0].tolist()
    pixels = x[i, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(target[i, row, column], pixels.flatten())
    model = contenders.backbone("attention-pos", "bare", 12, False, seed=0)
    changed = x.clone()
    changed[i, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
    with torch.no_grad():
        assert torch.equal(model(x, hidden), model(changed, hidden))


def test_tracing_labels_what_hangs_together_with_the_red_dot(photos):
    """From the red dot's pixels, white pixels lead to every token of label 1, and to none of label 0."""
    task = tasks.Tracing(photos)
    reds = []
    for x, labels, along in [*task.batches(0, 2, 8), next(task.test_batches("test", "1.5", 8))]:
        white = (x == task.WHITE).all(1)
        red = (x == torch.tensor(task.DOTS[0]).view(3, 1, 1)).all(1)
        assert (red.sum((1, 2)) == 9).all()
        reds.append(red[..., : x.shape[-1] // 2].any((1, 2)))
        for _ in range(x.shape[-1] ** 2):
            reached = red | white & (F.max_pool2d(red[:, None].float(), 3, 1, 1)[:, 0] > 0)
            if torch.equal(reached, red):
                break
            red = reached
        tokens = F.max_pool2d(red[:, None].float(), 2)[:, 0] > 0
        assert (tokens[labels == 1]).all() and not (tokens[labels == 0]).any()
        asked = (labels != task.IGNORED) & (along >= task.NEAR)
        counts = [((labels == label) & asked).sum((1, 2)).float() for label in (0, 1)]
        assert (torch.stack(counts) > 2).all() and torch.allclose(*(count.mean() for count in counts), rtol=0.25)
    reds = torch.cat(reds)
    assert reds.any() and not reds.all()  # the dot is on either side


def test_the_picture_of_tracing_colours_tokens_by_the_answer(photos, tmp_path):
    labels = torch.tensor([[1, 0], [tasks.Tracing.IGNORED, 0]])
    shown = tracing.answers(labels, torch.tensor([[1, 1], [1, 0]]))
    expected = [[tracing.RED, tracing.RED], [tracing.NOTHING, tracing.BLUE]]
    assert torch.equal(shown, torch.tensor(expected))
    model = contenders.backbone("none", "bare", 2, False, seed=0).eval()
    tracing.draw(tasks.Tracing(photos), {"nothing": model}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_run_learns_and_says_what_it_measured(photos, name):
    task = tasks.TASKS[name](photos)
    found = study.train(Run(name, "bare", "none", 3e-3, 0, 6), task, FEW, batch_size=4)
    assert list(found["test"]) == list(task.settings) and found["finite"]
    assert found["test"][task.usual]["examples"] == 8 and found["steps"] == 6 and len(found["looks"]) == 5


def _content(run, accuracy, loss=1.0, finite=True):
    test = {setting: {"loss": loss, "accuracy": accuracy - 0.01 * i} for i, setting in enumerate(("1", "0.75"))}
    test |= {setting: {"loss": loss, "accuracy": accuracy / 2} for setting in ("1.5", "2")}
    look = {"step": 3, "loss": loss, "accuracy": accuracy}
    return {
        **run._asdict(),
        "parameters": 190_000,
        "batch": 64,
        "finite": finite,
        "val": {"loss": loss, "accuracy": accuracy},
        "test": test,
        "looks": [look],
        "environment": {"cpu": "a chip", "torch": "2", "commit": "0123456789", "uncommitted_changes": run.seed > 0},
        "cpu_ms_per_step": 400.0 + 10 * run.seed,
    }


def test_the_runner_skips_what_exists_and_writes_what_is_missing(photos, tmp_path, monkeypatch, capsys):
    """Two runs are wanted; one of them is there and stays as it is."""
    wanted = [Run("classes", "bare", "none", 3e-3, seed, 2) for seed in (0, 1)]
    monkeypatch.setattr(study, "stages", lambda done: iter([("test", wanted)]))
    keep(wanted[0], _content(wanted[0], 0.5), tmp_path)
    before = (tmp_path / f"{wanted[0].stem}.json").read_text()
    assert study.work(tmp_path, photos, minutes=1, examples=FEW, only=("dw7",)) == 0
    assert study.work(tmp_path, photos, minutes=1, examples=FEW) == 1
    told = capsys.readouterr().out
    assert f"test: {wanted[1].stem}\n" in told and "; val loss " in told and " minutes\n" in told
    assert (tmp_path / f"{wanted[0].stem}.json").read_text() == before
    assert set(study.read(tmp_path)) == set(wanted)
    assert study.work(tmp_path, photos, minutes=1, examples=FEW) == 0
    content = json.loads((tmp_path / f"{wanted[1].stem}.json").read_text())
    assert content["environment"]["torch"] == torch.__version__ and len(content["curve"]) == 2
    assert content["environment"]["load_after"] > 0


def test_the_queue_takes_seeds_at_the_best_rate():
    done = {}
    _, first = next(study.missing(done))
    assert first == Run("classes", "bare", study.FIRST[0], study.RATES[1], 0) and set(study.MAIN) < set(RUNNING)
    losses = dict(zip(study.RATES, (1.4, 1.2, 1.3), strict=True))
    for name in RUNNING:
        for rate, loss in losses.items():
            run = Run("classes", "bare", name, rate, 0)
            if name == "dw7":
                loss = {1.5e-3: 1.1}.get(rate, loss)
            if name == "none":
                loss = {6e-3: 1.1}.get(rate, loss)
            done[run] = _content(run, 0.4, loss, finite=(name, rate) != ("linear", 3e-3))
    wanted = [(what, run) for what, run in study.missing(done) if what.startswith("classes, bare")]
    # the best rate is the largest for none, and for linear, whose middle one diverged; for dw7 it is the least
    further = dict.fromkeys(run for what, run in wanted if what.endswith("further out"))
    assert [(run.contender, run.rate) for run in further] == [
        ("none", 12e-3),
        ("dw7", 0.75e-3),
        ("linear", 12e-3),
    ]
    done |= {run: _content(run, 0.4, loss=2.0) for run in further}
    elsewhere = ("main contenders", "remedies", "far", "tracing")
    what, run = next(found for found in study.missing(done) if not any(each in found[0] for each in elsewhere))
    assert what == "classes, bare: seeds" and run == Run("classes", "bare", "none", study.RATES[2], 1)
    following = {run.contender: run.rate for what, run in study.missing(done) if what == "classes, bare: seeds"}
    assert following["gspn-global"] == study.RATES[1] and following["dw7"] == study.RATES[0]
    assert following["linear"] == study.RATES[2]


def test_the_report_of_two_contenders(tmp_path):
    accuracies = {"gspn-global": (0.48, 0.46, 0.50), "dw7": (0.44, 0.43, 0.48)}
    for name, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            run = Run("classes", "bare", name, 3e-3, seed)
            keep(run, _content(run, accuracy), tmp_path)
    text = report.report(study.read(tmp_path), tmp_path / "out" / "report")
    row = next(line for line in text.splitlines() if line.startswith("| depthwise 7x7") and "190,000" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[-2] == "410" and "one processor, a chip," in text
    assert "Commits: 01234567, 01234567 with uncommitted changes." in text and "of 10,000 test photos" in text
    assert cells[4] == "3" and cells[6:8] == [
        "45.00 ± 2.65",
        "-3.00 ± 0.58",
    ]  # differences -4, -3, -2: deviation 1, over sqrt(3)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "report.md",
        "report-classes-bare-curves.png",
        "report-classes-bare-settings.png",
    }


def test_a_curve_ends_with_the_last_look_on_as_many_examples(tmp_path, monkeypatch):
    """What is measured after training is of more examples."""
    drawn = []
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    run = Run("classes", "bare", "dw7", 3e-3, 0)
    looks = [{"step": step, "accuracy": step / 1000} for step in (100, 500)]
    content = _content(run, 0.9) | {"looks": looks}
    report.curves_picture({"dw7": [content]}, tasks.Classes, "bare", tmp_path / "a.png", {"dw7": 400.0})
    assert drawn[0].lines[0].get_xydata().tolist() == [[40.0, 10.0], [200.0, 50.0]]
    assert "step 500 of 600" in drawn[0].get_xlabel() and "1,000" in drawn[0].get_ylabel()


def test_times_are_those_of_the_processor_that_ran_most_contenders():
    """And not of one on which there are more runs, of remedies and of a single mixer."""
    runs = [("none", 0, "old"), ("dw7", 0, "old"), ("gspn-g8", 0, "new"), ("gspn-normed", 0, "new"), ("dw7", 1, "new")]
    done = {}
    for name, seed, processor in runs:
        run = Run("classes", "bare", name, 3e-3, seed)
        done[run] = _content(run, 0.4) | {"environment": {"cpu": processor}}
    contents = [content for run, content in done.items() if not contenders.CONTENDERS[run.contender].remedy]
    assert times(contents, report.TIME) == ("old", {"none": 400.0, "dw7": 400.0})


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'dw9'"):
        contenders.backbone("dw9", "bare", 10, True, seed=0)
    with pytest.raises(ValueError, match="'naked'"):
        contenders.backbone("dw7", "naked", 10, True, seed=0)


def test_a_ramp_as_long_as_the_map_is_the_layer_that_is_not_centred():
    torch.manual_seed(0)
    z, plain = torch.randn(2, 5, 5, 8), remedies.Variant(8, normed_output=False)
    ramp = remedies.Variant(8, normed_output=False, centred=True, ramp=5.0)
    ramp.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(ramp(z), plain(z), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        ramp.ramp.zero_()
    centred = remedies.Variant(8, normed_output=False, centred=True)
    centred.load_state_dict(plain.state_dict())
    torch.testing.assert_close(ramp(z), centred(z))
    assert not torch.allclose(centred(z), plain(z), atol=1e-3)


def test_logits_start_at_the_level_that_is_asked_for():
    bias = remedies.Variant(8, level=-3.0).ray_bias
    assert bias.shape == (4, 3, 8) and (bias == -3).all()
    rays = remedies.Variant(8, rays=3.0).ray_bias[0, :, 1]  # of the group that starts with the same place
    assert rays.tolist() == [remedies.LEVEL - 3, remedies.LEVEL, remedies.LEVEL - 3]
    assert remedies.Variant(8).ray_bias is None
