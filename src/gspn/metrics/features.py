"""Features by which two sets of images are compared: Inception's, as is usual, or those of another network, which the
metrics then name.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gspn.digests import digest, settings, tensors_of
from gspn.options import OptionError
from gspn.places import expanded
from gspn.runs import load_classifier

KINDS = (
    "`inception` or `inception,FILE` (Inception's published weights), `classifier:RUN` (a run of gspn train), "
    "`timm:MODEL` (a model of timm with its published weights) or `timm:MODEL,FILE` (weights in a file)"
)
OTHERS = "classifier:RUN and timm:MODEL,FILE need neither; the distances then bear their names"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


@dataclass
class Extractor:
    """A network that makes features of images.

    Attributes:
        name: as the user gave it, such as "timm:tf_efficientnet_lite0".
        network: uint8 (B, channels, H, W) to (features (B, d), logits (B, K) or None).
        channels: 1 or 3.
        rule: a text that says how the network resizes its input.
        class_names: those of the logits, where they can be compared with the samples' classes; else None.
        standard: whether these are the features of the published FID, KID and so on.
    """

    name: str
    network: nn.Module
    channels: int
    rule: str
    class_names: list[str] | None = None
    standard: bool = False

    def called(self, what: str) -> str:
        """A metric's name: FID, say, or "Frechet distance (timm:resnet18)"."""
        published = {"Frechet distance": "FID", "kernel distance": "KID", "score": "Inception Score"}
        return published.get(what, what) if self.standard else f"{what} ({self.name})"

    def digest(self, like: str | None = None) -> str:
        """A digest of weights, settings, input and classes, in the scheme of `like`; name and path do not count."""
        what = type(self.network).__name__, self.channels, self.rule, self.class_names
        weights = tensors_of(self.network.state_dict(), "{name} {dtype} {shape}")
        return digest([repr(what), *weights, settings(getattr(self.network, "model", self.network))], like)


def load_extractor(name: str) -> Extractor:
    """The Extractor of a name (see KINDS), in evaluation mode on the CPU.

    Errors: OptionError says what is missing and what to use instead; there is no silent fallback.
        RunError for a run that cannot be used.
    """
    if name == "inception" or name.startswith("inception,"):
        _, _, file = name.partition(",")
        return _inception(name, file and str(expanded(file)))
    kind, _, rest = name.partition(":")
    if kind == "classifier" and rest:
        return _classifier(name, rest)
    if kind == "timm" and rest:
        model, _, file = rest.partition(",")
        return _timm(name, model, file and str(expanded(file)))
    raise OptionError(f"unknown features {name!r}; expected {KINDS}")


# -- networks: uint8 images to (features, logits) --


class Pooled(nn.Module):
    """A classifier's pooled features before its head, and its logits. The whole image is resized to `size`."""

    def __init__(self, model, size, mean, std):
        super().__init__()
        self.model, self.size = model, tuple(size)
        for key, value in {"mean": mean, "std": std}.items():
            self.register_buffer(key, torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        x = pixels.float()
        if tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True).clamp(0, 255)
        maps = self.model.forward_features((x / 255 - self.mean) / self.std)
        features = self.model.forward_head(maps, pre_logits=True)
        head = self.model.get_classifier()
        return features, head(features) if isinstance(head, nn.Linear) else None

    def rule(self):
        """See Extractor."""
        return "the network resizes them to {}x{}, bicubic with antialiasing".format(*self.size)


class Inception(nn.Module):
    """torch-fidelity's Inception, which resizes its input as TensorFlow did."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(pixels)


# -- sources of networks --


def _classifier(name, path):
    found = load_classifier(path)
    how = found.preprocessing
    return _pooled(name, found.model, how.channels, how.size, how.mean, how.std, found.classes)


def _timm(name, model, file):
    try:
        import timm
    except (
        Exception
    ) as error:  # torchvision, which timm imports, raises RuntimeError beside a torch it was not made for
        raise OptionError(
            f'features {name!r} need timm, which does not import here ({error}): pip install "gspn[timm]", or use '
            "features classifier:RUN"
        ) from error
    if model not in timm.list_models():
        raise OptionError(f"timm {timm.__version__} has no model {model!r}")
    built = timm.create_model(model, pretrained=False) if file else _with_published_weights(timm, name, model)
    if file:
        _load_weights(built, file)
    config = built.pretrained_cfg
    channels, *size = config["input_size"]
    return _pooled(name, built, channels, size, config["mean"], config["std"])


def _pooled(name, model, channels, size, mean, std, class_names=None):
    network = Pooled(model, size, mean, std).eval()
    with torch.inference_mode():
        features, _ = network(torch.zeros(1, channels, *size, dtype=torch.uint8))
    if features.ndim != 2:
        raise OptionError(f"{name} gives features of the shape {tuple(features.shape)} for an image, expected one row")
    return Extractor(name, network, channels, network.rule(), class_names)


def _with_published_weights(timm, name, model):
    try:
        return timm.create_model(model, pretrained=True)
    except Exception as error:  # the hub's, the network's and timm's own
        raise OptionError(
            f"the weights of {name!r} cannot be loaded: {type(error).__name__}: {error}. Give them in a file, "
            f"timm:{model},FILE, or use features classifier:RUN"
        ) from error


def _load_weights(model, file):
    try:
        tensors = load_file(file) if file.endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)
        model.load_state_dict(tensors)
    except (OSError, EOFError, TypeError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        raise OptionError(f"the weights {file} do not fit {type(model).__name__}: {error}") from error
    except Exception as error:  # what unpickling refuses
        raise OptionError(f"the weights {file} cannot be read: {type(error).__name__}: {error}") from error


def _inception(name, file):
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # torchvision's RuntimeError, as above
        raise OptionError(
            f"features {name!r}, and with them FID, need torch-fidelity, which does not import here ({error}): pip "
            f'install "gspn[metrics]", in an environment where torchvision fits torch. {OTHERS}'
        ) from error
    standard = True
    if file:
        try:
            standard = hashlib.sha256(Path(file).read_bytes()).hexdigest() == INCEPTION_SHA256
            torch.load(file, "cpu", weights_only=True)  # the library itself would unpickle anything
        except Exception as error:
            raise OptionError(f"the weights {file} cannot be read: {type(error).__name__}: {error}") from error
    try:
        model = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], file or None)
    except Exception as error:  # the network's, or of weights that do not fit
        hint = "they do not fit Inception" if file else "give them in a file, inception,FILE"
        raise OptionError(
            f"Inception's weights cannot be loaded: {type(error).__name__}: {error}; {hint}. {OTHERS}"
        ) from error
    rule = "the network resizes them to 299x299, bilinear as in TensorFlow 1"
    return Extractor(name, Inception(model).eval(), 3, rule, standard=standard)
