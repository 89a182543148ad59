"""What the tests of swapping share: tiny UNets of the three kinds, inputs for them, all that a swap may change."""

import torch
from helpers.stable_diffusion import tiny_unet

KINDS = {
    "sd15": {},
    "sd2": dict(use_linear_projection=True, attention_head_dim=(1, 2), cross_attention_dim=24, upcast_attention=True),
    "sdxl": dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    ),
}
FORMS = ("pure", "qkv")


def unet_of(kind="sd15", **config):
    torch.manual_seed(0)
    return tiny_unet(**KINDS[kind] | config).eval()


def inputs(unet, height=8, width=8, batch=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float32).to(unet.dtype)  # noqa: E731
    arguments = dict(sample=normal(batch, 4, height, width), timestep=torch.tensor(7))
    arguments["encoder_hidden_states"] = normal(batch, 5, unet.config.cross_attention_dim)
    if unet.config.addition_embed_type:
        times = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(batch, -1).to(unet.dtype)
        arguments["added_cond_kwargs"] = {"text_embeds": normal(batch, 16), "time_ids": times}
    return arguments


@torch.no_grad()
def run(unet, *size, **more):
    return unet(**inputs(unet, *size) | more).sample


def state_of(unet):
    """All that a swap may change: weights, modules, hooks, attributes, modes."""
    modules = dict(unet.named_modules())
    return (
        {key: value.clone() for key, value in unet.state_dict().items()},
        {name: (id(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in modules.items()},
        set(unet.__dict__),
        {name: parameter.requires_grad for name, parameter in unet.named_parameters()},
    )


def assert_same_state(unet, before):
    after = state_of(unet)
    assert list(after[0]) == list(before[0]) and after[1:] == before[1:]
    assert all(value.is_meta or torch.equal(after[0][key], value) for key, value in before[0].items())
