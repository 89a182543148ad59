"""The comparison of mixers in gspn_mobile: equal parameters, the library's own training, a report."""

import json

import pytest
import torch

pytest.importorskip("matplotlib")

import gspn
from benchmarks.harness import study
from benchmarks.quality import photos
from benchmarks.quality.photos import CLASSES, CONTENDERS, FACTORS, MODEL, RATES, Run


def test_all_have_as_many_parameters_and_take_any_size():
    wanted = study.parameters_of(gspn.create_model(MODEL, num_classes=CLASSES))
    for name, contender in CONTENDERS.items():
        model = photos.classifier_with(name, MODEL, num_classes=CLASSES, expansion=photos.expansion_of(name)).eval()
        assert abs(study.parameters_of(model) / wanted - 1) < 0.02, name
        scans = any(isinstance(module, gspn.GSPN2d) for module in model.modules())
        assert scans == (contender.make is None)
        with torch.no_grad():
            assert model(torch.randn(1, 3, 45, 37)).shape == (1, CLASSES)


@pytest.mark.parametrize(
    "name, mixer", [("attention", ["0.weight", "1.module.out.weight", "1.module.qkv.weight", "2.weight"]), ("none", [])]
)
def test_a_run_is_trained_by_the_library_and_opened_with_its_mixer(name, mixer, colours, monkeypatch):
    monkeypatch.setattr(photos, "expansion_of", lambda name: 1.0)
    content = photos.train(Run(name, 1e-2, 0, 1), colours, size=(32, 32), batch_size=8)
    assert set(content["test"]) == {str(factor) for factor in FACTORS} and len(content["curve"]) == 1
    assert content["test"]["1"]["top1"] == pytest.approx(content["curve"][-1]["top1"], abs=0.2)
    assert content["mixer"] == mixer
    model = photos.classifier_with(name, MODEL, num_classes=3, expansion=1.0)
    assert content["parameters"] == study.parameters_of(model)


def test_missing_runs_come_in_order_and_the_report_tells_them(tmp_path):
    first = next(photos.wanted({}, 2))
    assert first == Run("gspn", RATES[0], 0, 2)
    for rate, seed, top1, loss in ((RATES[1], 0, 0.9, 2.0), (RATES[0], 0, 0.4, 1.0), (RATES[0], 1, 0.5, 1.0)):
        run = Run("gspn", rate, seed, 2)
        test = {str(factor): {"top1": top1, "loss": 1.0} for factor in FACTORS}
        content = run._asdict() | {"parameters": 1234, "test": test, "cpu_seconds_of_training": 2.0}
        content |= {"curve": [{"epoch": 1, "train_loss": loss, "top1": top1}]}
        (tmp_path / f"{run.stem}.json").write_text(json.dumps(content))
    assert photos.best_rate(photos.read(tmp_path), "gspn", 2) == RATES[0]
    text = photos.report(tmp_path)
    assert "| GSPN | 1,234 | 0.005 of 2 | 2 | 45.0 ± 7.1 |" in text and "not run" in text
    photos.draw(tmp_path, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 5_000
