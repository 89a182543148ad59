"""The networks of `gspn fid`: what their features are, and what the numbers are then called."""

import sys
import types

import numpy as np
import pytest
import torch
from helpers.comparing import (
    NAMES,
    as_npz,
    classifier_run,
    colour_extractor,
    colour_features,
    compare,
    looked_at,
    paint_both,
)
from torch import nn

from gspn.data.images import DataError
from gspn.metrics import features, fid
from gspn.metrics.features import load_extractor
from gspn.options import OptionError
from gspn.train.run import RunError


@pytest.fixture
def pictures(tmp_path):
    return paint_both(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return classifier_run(tmp_path_factory.mktemp("runs") / "run")


@torch.inference_mode()
def test_a_classifier_s_features_come_before_its_head(run):
    extractor = load_extractor(f"classifier:{run.path}")
    pixels = torch.randint(0, 256, (4, 3, 12, 16), dtype=torch.uint8)
    got, logits = extractor.network(pixels)
    x = (pixels / 255 - 0.4) / 0.2
    assert torch.allclose(logits, run.model(x), atol=1e-5)
    assert torch.allclose(got, run.model.forward_features(x).mean((2, 3)), atol=1e-5) and got.shape == (4, 8)
    assert extractor.class_names == NAMES and not extractor.standard
    larger, _ = extractor.network(pixels.repeat_interleave(3, 2).repeat_interleave(3, 3))
    assert larger.shape == (4, 8) and "12x16, bicubic" in extractor.rule


def test_names_of_features(run, tmp_path):
    for wrong in ("vgg", "inception:", "classifier:", "timm:", "inceptionv3"):
        with pytest.raises(OptionError, match="`inception`"):
            load_extractor(wrong)
    with pytest.raises(RunError, match="no run"):
        load_extractor(f"classifier:{tmp_path}")


class FakeInception(nn.Module):
    """What stands for torch-fidelity's: the same arguments, few features."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        if feature_extractor_weights_path is None:
            raise OSError("no network")
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
        return pixels.float().mean((2, 3)), pixels.float().mean((2, 3)) / 100


def test_only_inception_s_published_weights_make_a_fid(pictures, monkeypatch):
    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    module = types.SimpleNamespace(FeatureExtractorInceptionV3=FakeInception)
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(OptionError, match=r"weights .*OSError: no network.*file"):
        load_extractor("inception")
    file = pictures.at / "weights.pth"
    with pytest.raises(OptionError, match="FileNotFoundError"):
        load_extractor(f"inception,{file}")
    torch.save({}, file)
    other = compare(pictures.drawn, pictures.real, load_extractor(f"inception,{file}"))
    assert other["names"]["frechet_distance"] == f"Frechet distance (inception,{file})"
    monkeypatch.setattr(features, "INCEPTION_SHA256", features.hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setenv("HOME", str(file.parent))
    extractor = load_extractor(f"inception,~/{file.name}")
    result = compare(pictures.drawn, pictures.real, extractor)
    assert list(result["names"].values())[:3] == ["FID", "KID", "precision"]
    assert result["names"]["score"] == "Inception Score" and result["accuracy"] is None
    torch.save({"a": FakeInception}, file)  # would run code where unpickled
    with pytest.raises(OptionError, match="cannot be read"):
        load_extractor(f"inception,{file}")
    # statistics as others publish them
    published = pictures.at / "published.npz"
    np.savez(published, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(OptionError, match=r"Inception's: .*colours"):
        compare(pictures.drawn, published)
    np.savez(published, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(DataError, match="2048 features"):
        compare(pictures.drawn, published, extractor)
    np.savez(published, mu=np.zeros(3))
    with pytest.raises(DataError, match=r"holds mu; .*sigma"):
        compare(pictures.drawn, published, extractor)


def test_published_mean_and_covariance(pictures, monkeypatch):
    monkeypatch.setattr(fid, "INCEPTION_FEATURES", 6)
    extractor, x = colour_extractor(standard=True), colour_features(pictures.images[1])
    published = pictures.at / "published.npz"
    np.savez(published, mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    from_file = compare(pictures.drawn, published, extractor)
    from_images = compare(pictures.drawn, as_npz(pictures.at / "a.npz", pictures.images[1]), extractor)
    assert from_file["frechet_distance"] == pytest.approx(from_images["frechet_distance"], rel=1e-6)
    assert from_file["kernel_distance"] is None and from_file["reference"]["images"] is None
    assert any("no kernel distance" in note for note in from_file["notes"]) and from_file["size"] == [10, 8]
    looked_at(extractor)
    for wrong in ({"mu": np.full(6, np.nan)}, {"sigma": np.full((6, 6), np.inf)}):
        np.savez(published, **{"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)} | wrong)
        with pytest.raises(DataError, match=r"published\.npz .*no finite numbers"):
            compare(pictures.drawn, published, extractor)
    assert looked_at(extractor) == 0


def test_what_is_not_installed_is_said(monkeypatch):
    for name, module in (("inception", "torch_fidelity"), ("timm:resnet18", "timm")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(OptionError, match=r"import.*pip install \"gspn\[.*classifier:RUN"):
            load_extractor(name)


@pytest.mark.timm
def test_a_model_of_timm(pictures):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet").eval()
    file = pictures.at / "weights.pth"
    torch.save(model.state_dict(), file)
    extractor = load_extractor(f"timm:test_efficientnet,{file}")
    size, mean, std = (model.pretrained_cfg[key] for key in ("input_size", "mean", "std"))
    pixels = torch.randint(0, 256, (2, *size), dtype=torch.uint8)
    with torch.inference_mode():
        got, logits = extractor.network(pixels)
        x = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert torch.allclose(logits, model(x), atol=1e-4) and got.ndim == 2
    result = compare(pictures.drawn, pictures.real, f"timm:test_efficientnet,{file}")
    assert result["dimension"] == got.shape[1] and result["names"]["score"].startswith("score (timm:test_efficientnet")
    with pytest.raises(OptionError, match="'no_such'"):
        load_extractor("timm:no_such")
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(OptionError, match="fit EfficientNet"):
        load_extractor(f"timm:test_efficientnet,{file}")
