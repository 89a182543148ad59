"""The study of distilling for sizes: what is measured, what the remedies do, missing runs are made, a report."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from safetensors.torch import save_file

import gspn
from benchmarks.quality import text_to_image_sizes as study
from benchmarks.quality.mixers.tasks import Photos
from benchmarks.quality.text_to_image_sizes import CONTENDERS, REMEDIES, Run, Teacher, teacher_run


@pytest.fixture(scope="module")
def photos():
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=source)
    return Photos({split: (pixels, torch.arange(20) % 10) for split in ("train", "val", "test")})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(Teacher().state_dict(), path, {"steps": "7", "seed": "0"})
    return path


def test_what_is_measured(photos, file):
    """A model that predicts 0 has the loss |v|^2; one that knows v has none; the same noise at each call."""
    teacher, made = study.open_teacher(file)
    zero = study.measure(lambda noisy, t, states: 0 * noisy, teacher, photos["test"], "32x64", 20)
    assert made == {"steps": 7, "seed": 0} and len(zero["each"]) == 20 and len(zero["by_timestep"]) == study.BUCKETS
    assert zero["loss"] == pytest.approx(sum(zero["each"]) / 20, abs=1e-4) and 0.2 < zero["loss"] < 1.1
    assert study.measure(lambda noisy, t, states: 0 * noisy, teacher, photos["test"], "32x64", 20) == zero
    first, *_, last = zero["by_timestep"]  # v is nearly the noise at first and nearly the image at last
    assert 0.85 < first < 1 and last == pytest.approx(
        (study.pixels(photos["test"][0], (32, 64)) ** 2).mean().item(), abs=0.05
    )


def test_remedies_change_larger_maps_and_nothing_for_good(file):
    teacher, _ = study.open_teacher(file)
    swapped = gspn.swap(teacher.unet, form="qkv")
    given = torch.randn(2, 12, 32, 16), torch.tensor([3, 700]), teacher.states(torch.tensor([1, 10]))
    with torch.no_grad():
        for active in ("gspn", "attention"):
            swapped.use(active)
            before = teacher.predict(*given)
            for name, remedy in REMEDIES.items():
                if active == "attention" and remedy is study.trained_segments:
                    continue
                with remedy(swapped, (64, 32)):
                    assert not torch.allclose(teacher.predict(*given), before, atol=1e-5), (active, name)
                if name not in ("segments as trained", "without self-attention"):
                    with remedy(swapped, (32, 32)):  # the trained size
                        torch.testing.assert_close(teacher.predict(*given), before)
                assert torch.equal(teacher.predict(*given), before), (active, name)


def test_sub_lattices_by_hand(file):
    """An attention on each of the interleaved lattices alone."""
    teacher, _ = study.open_teacher(file)
    swapped = gspn.swap(teacher.unet, form="qkv")
    swapped.use("attention")
    attention = next(iter(swapped.attentions.values()))
    seen = []
    attention.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args[0], output)), with_kwargs=True
    )
    with torch.no_grad(), study.sub_lattices(swapped, (64, 32)):
        teacher.predict(torch.randn(1, 12, 32, 16), torch.tensor([3]), teacher.states(torch.tensor([1])))
    x, y = (tokens.view(32, 16, -1) for tokens in seen[0])
    for i in range(2):
        wanted = attention(x[i::2].reshape(1, 16 * 16, -1))
        torch.testing.assert_close(y[i::2].reshape(1, 16 * 16, -1), wanted)


@pytest.mark.slow
def test_missing_runs_are_made_and_told(photos, file, tmp_path, monkeypatch):
    few = {"32x32": 5, "48x48": 5, "64x64": 5, "32x64": 5}
    names = ("teacher", "global", "segment4-sizes", "attention-sizes")
    monkeypatch.setattr(study, "CONTENDERS", {name: CONTENDERS[name] for name in names})
    monkeypatch.setattr(study, "MAIN", ("attention-sizes",))
    monkeypatch.setattr(study, "RATES", {"muon": (0.002,), "adamw": (0.002, 0.004)})
    monkeypatch.setattr(study, "SIZES", few)
    trained = study.train
    few_steps = lambda run, *given: trained(  # noqa: E731
        run._replace(steps=min(2, run.steps)), *given, sizes=few, batch=2
    )
    monkeypatch.setattr(study, "train", lambda run, *given: few_steps(run, *given) | run._asdict())
    teachers = {0: file, 1: file}
    assert study.work(tmp_path, photos, teachers, 0) == 0
    assert study.work(tmp_path, photos, teachers, 60) == 2 + 3 * (3 + 2)  # three rates, then two bests
    done = study.read(tmp_path)
    assert set(done) == set(study.wanted(done)) and teacher_run(0) in done
    first = done[Run("global", "adamw", 0.002, 0)]
    assert set(first["remedies"]) == set(REMEDIES) == set(study.ALL)
    assert "segments as trained" not in done[teacher_run(0)]["remedies"]
    for optimizer in ("adamw", "muon"):  # both learn, and not the same
        run = done[Run("attention-sizes", optimizer, 0.002, 0)]
        assert run["test"]["32x32"] != done[teacher_run(0)]["test"]["32x32"]
    assert done[Run("global", "muon", 0.002, 0)]["test"] != first["test"]
    text = study.report(tmp_path)
    assert "| global | muon | 0.002 of 1 | 2 |" in text and "±" in text and "sub-lattices" in text
    best = study.best_rate(done, "global", "adamw")
    other = done[Run("global", "adamw", 0.006 - best, 0)]["val"]
    assert sum(done[Run("global", "adamw", best, 0)]["val"].values()) < sum(other.values())
    study.draw(tmp_path, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 5_000


def test_the_teacher_is_trained_and_opened(photos, tmp_path):
    study.train_teacher(photos, tmp_path / "teacher.safetensors", minutes=0.005, seed=3)
    teacher, made = study.open_teacher(tmp_path / "teacher.safetensors")
    assert made["steps"] >= 1 and made["seed"] == 3 and not any(p.requires_grad for p in teacher.parameters())
