"""The comparison of mixers in segmenters: equal parameters, the library's own training, a report."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")

import gspn
from benchmarks.harness import study
from benchmarks.quality import segmentation
from benchmarks.quality.segmentation import RATES, SEEDS, Run
from benchmarks.quality.segmentation_mixers import CLASSES, CONTENDERS, Residual, WindowAttention, made
from gspn.layers import GlobalResponseNorm


@pytest.mark.parametrize("of", ["gspn_micro", "gspn_mobile"])
def test_all_have_as_many_parameters_and_take_any_size(of):
    wanted = study.parameters_of(gspn.create_segmenter(of, num_classes=CLASSES))
    for name in segmentation.of_model(of):
        model = made(name).eval()
        assert abs(study.parameters_of(model) / wanted - 1) < 0.02, name
        in_decoder = any(isinstance(module, gspn.GSPN2d) for module in model.blocks.modules())
        in_backbone = any(isinstance(module, gspn.GSPN2d) for module in model.backbone.modules())
        expected = CONTENDERS[name].make is None
        assert (in_backbone, in_decoder) == (expected, expected or name == "mobile-decoder")
        with torch.no_grad():
            assert model(torch.randn(1, 3, 45, 37)).shape == (1, CLASSES, 45, 37)


@pytest.mark.parametrize("name", segmentation.of_model("gspn_mobile"))
def test_every_parameter_of_a_contender_takes_part(name):
    """A mixer of zeros in a block that has no way around it would leave the block's parameters dead."""
    torch.manual_seed(0)
    model = made(name).train()
    for module in model.modules():
        if isinstance(module, (torch.nn.LayerNorm, GlobalResponseNorm)):
            torch.nn.init.normal_(next(module.parameters()))  # some start at 0
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    unused = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # what is added before a batch norm, or where a mixer gives nothing, has no effect
    assert not [key for key in unused if not (name in ("mobile-none", "mobile-decoder") and ".norm." in key)], unused


@pytest.mark.parametrize("name", ["attention", "linear"])
def test_attention_in_gspn_micro_adds_to_its_input(name):
    mixers, x = [module for module in made(name).modules() if isinstance(module, Residual)], torch.randn(1, 96, 9, 9)
    blocks = [module for module in made("gspn").modules() if isinstance(module, gspn.GSPN2d)]
    assert len(mixers) == len(blocks)
    mixer = CONTENDERS[name].make(96, 8, 0)
    torch.nn.init.zeros_(mixer.layer.module.out.weight)
    assert torch.equal(mixer(x), x)


@pytest.mark.parametrize("shift", [0, 3])
def test_window_attention_is_attention_within_windows(shift):
    attention, x = WindowAttention(16, shift), torch.randn(2, 10, 9, 16)
    window = torch.tensor([((i + shift) // 7) * 10 + (j + shift) // 7 for i in range(10) for j in range(9)])
    qkv = attention.qkv(x).reshape(2, 90, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(*qkv, attn_mask=window[:, None] == window)
    torch.testing.assert_close(attention(x), attention.out(mixed.transpose(1, 2).reshape(x.shape)))


def test_an_optimizer_is_trained_with_and_needs_its_own_folder(tmp_path, monkeypatch, capsys):
    def called(*given):
        run = "contender=gspn,rate=0.002,seed=0,epochs=3,scale=0.25"
        monkeypatch.setattr("sys.argv", ["segmentation", "--scenes", "any", "--runs", run, *given])
        segmentation.main()

    def train(run, scenes, **more):
        seen.append(more)
        return run._asdict() | more | {"val_miou": 0.1, "test": {}}

    seen = []
    monkeypatch.setattr(segmentation, "train", train)
    for optimizer in ("adamw", "muon"):
        given = ("--out", str(tmp_path / optimizer), *(("--optimizer", "muon") if optimizer == "muon" else ()))
        called(*given)
        called(*given)  # the second time it is there
    assert seen == [{"optimizer": "adamw"}, {"optimizer": "muon"}]
    for given in (("--out", str(tmp_path / "muon")), ("--optimizer", "muon")):  # by default the runs of AdamW
        with pytest.raises(SystemExit):
            called(*given)
        assert "runs of other settings need another folder" in capsys.readouterr().err
    assert len(seen) == 2


def test_missing_runs_come_in_order_and_the_report_tells_them(tmp_path):
    runs = iter(segmentation.wanted({}, 3, 0.25))
    first = next(runs)
    rates = RATES["gspn_micro"]
    assert first == Run("mobile", RATES["gspn_mobile"][1], SEEDS[0], 3, 0.25)
    gspn_runs = [Run("gspn", rates[i], seed, 3, 0.25) for i, seed in ((0, 0), (1, 0), (1, 1))]
    longer = Run("attention", rates[0], 0, 9, 0.25)
    for run, miou in zip([*gspn_runs, longer], (0.2, 0.4, 0.5, 0.6), strict=True):
        test = {str(f): {"miou": miou, "seconds_with_metrics": 0.5} for f in segmentation.FACTORS}
        content = run._asdict() | {"val_miou": miou, "parameters": 1234, "test": test, "cpu_seconds_of_training": 9}
        content |= {"environment": {"cpu": "a chip", "commit": "0123456789", "uncommitted_changes": False}}
        (tmp_path / f"{run.stem}.json").write_text(json.dumps(content))
    done = segmentation.read(tmp_path)
    assert segmentation.best_rate(done, "gspn", 3, 0.25) == rates[1]
    text = segmentation.report(tmp_path)
    assert "| GSPN | 1,234 | 0.002 of 2 | 2 | 45.0 ± 7.1 |" in text and "Commits: 01234567." in text
    three, nine = text.split("\n## ")[1:]
    assert "\nNot run: attention (7x7 windows at 1/4).\n" in three and "\nNot run: GSPN.\n" in nine
    never = text.splitlines()[-1]
    assert never.startswith("Never run: GSPN, center (gspn_mobile); ") and "not run" not in text
    assert never.endswith(
        "depthwise 7x7 alone (gspn_micro); linear attention + 5x5 (gspn_micro); GSPN, center (gspn_micro)."
    )
    segmentation.draw(tmp_path, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 5_000
