"""What the class-conditional generators share: how they are saved, loaded, called and checked, as diffusers' models."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
except ImportError as error:
    raise ImportError(
        f'generation needs diffusers, which cannot be imported ({error}): pip install "gspn[diffusion]"'
    ) from error


class Generator(ModelMixin, ConfigMixin):
    """A class-conditional model of noisy maps, which is used like diffusers' DiTTransformer2DModel.

    A subclass gives `_predict(hidden_states, timestep, class_labels, **options)`. Its config holds sample_size,
    patch_size, in_channels, out_channels, learn_sigma, hidden_size, depth, num_classes, class_dropout_prob and
    prediction_type. It calls `_make_start` before it makes its blocks, and `_make_end` after.
    """

    _supports_gradient_checkpointing = True

    def _make_start(self):
        """Checks the config, and makes ``patch_embed`` and ``embed``. Raises ValueError for what no generator takes."""
        config = self.config
        for name in ("sample_size", "patch_size", "in_channels", "num_classes", "hidden_size", "depth"):
            value = config[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} has to be a positive whole number, got {value!r}")
        if not 0 <= config.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob has to be at least 0 and below 1, got {config.class_dropout_prob}")
        if config.sample_size % config.patch_size:
            raise ValueError(
                f"sample_size has to be a multiple of patch_size {config.patch_size}, got {config.sample_size}"
            )
        if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"prediction_type has to be epsilon, v_prediction or sample, got {config.prediction_type!r}"
            )
        self.out_channels = config.in_channels * (1 + bool(config.learn_sigma))
        if config.out_channels not in (None, self.out_channels):
            raise ValueError(
                f"out_channels has to be {self.out_channels} for in_channels={config.in_channels}, "
                f"learn_sigma={config.learn_sigma}, got {config.out_channels}"
            )
        self.register_to_config(out_channels=self.out_channels)  # tells pipelines whether there is a variance
        self.gradient_checkpointing = False
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.embed = CombinedTimestepLabelEmbeddings(config.num_classes, width, config.class_dropout_prob)

    def _make_end(self):
        """Makes ``modulation`` and ``proj_out``."""
        width, patch = self.config.hidden_size, self.config.patch_size
        self.modulation = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch * patch * self.out_channels)

    def _init_ends(self):
        """As in DiT, the layers that predict start at 0, embeddings from a normal of deviation 0.02 (with 1, the first
        epochs learn less)."""
        for linear in (self.modulation, self.proj_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for name, parameter in self.embed.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | Any:  # a tuple with return_unused_kwargs=True
        """As in diffusers. Raises ValueError for the config of another model."""
        name = (config or {}).get("_class_name", cls.__name__)
        if name != cls.__name__:
            raise ValueError(f"this is the config of a {name}, expected that of a {cls.__name__}")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self | Any:  # a tuple with output_loading_info=True
        """As in diffusers. Raises ValueError if the weights belong to another model or are incomplete; diffusers would
        fill the gaps with random ones."""
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "also has")):
            if names := sorted(info[key]):
                shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
                raise ValueError(f"{pretrained_model_name_or_path} has another architecture: it {what} {shown}")
        return (model, info) if with_info else model

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Transformer2DModelOutput | Any:  # a tuple with return_dict=False
        """The prediction for the noisy maps `hidden_states` (B,in_channels,H,W) at `timestep` (B,) for `class_labels`
        (B,), with the arguments of diffusers' DiTTransformer2DModel. cross_attention_kwargs has to be empty."""
        patch, config = self.config.patch_size, self.config
        if hidden_states.ndim != 4 or hidden_states.shape[1] != config.in_channels:
            raise ValueError(f"expected (B,{config.in_channels},H,W), got {tuple(hidden_states.shape)}")
        height, width = hidden_states.shape[-2:]
        if height % patch or width % patch or not height or not width:
            raise ValueError(f"H and W have to be multiples of the patch of {patch}, got {height}x{width}")
        if timestep is None or class_labels is None:
            raise ValueError("timestep and class_labels have to be tensors (B,), got None")
        if cross_attention_kwargs:
            names = sorted(cross_attention_kwargs)
            raise ValueError(f"cross_attention_kwargs has to be empty, as there is no attention, got {names}")
        self._check_labels(class_labels)
        sample = self._predict(hidden_states, timestep, class_labels, **options)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _project_out(self, h: Tensor, condition: Tensor) -> Tensor:
        """The maps that the last layer predicts from normalised features h (B,H,W,D), shifted and scaled."""
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=1)
        h = h * (1 + scale[:, None, None]) + shift[:, None, None]
        return F.pixel_shuffle(self.proj_out(h).permute(0, 3, 1, 2), self.config.patch_size)

    if TYPE_CHECKING:  # nn.Module's is typed as Any

        def __call__(
            self,
            hidden_states: Tensor,
            timestep: Tensor | None = None,
            class_labels: Tensor | None = None,
            cross_attention_kwargs: dict | None = None,
            return_dict: bool = True,
            **options: Any,
        ) -> Transformer2DModelOutput | Any: ...

    def _check_labels(self, labels):
        # Reading labels on a GPU would stall it; there, torch's own assertion finds the wrong ones.
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.numel() == 0:
            return
        last = self.config.num_classes - (self.config.class_dropout_prob == 0)
        if labels.min() < 0 or labels.max() > last:
            wrong = sorted({label for label in labels.tolist() if not 0 <= label <= last})
            null = "" if last < self.config.num_classes else f", {last} is the null class of guidance"
            raise ValueError(f"class labels have to be from 0 to {last}{null}; got {wrong}")
