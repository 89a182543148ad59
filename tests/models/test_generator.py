"""The generator: its sizes, any shape of map, what its scan reaches, classes, saving, diffusers' own pipeline."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from helpers.diffusion import TINY, lively, tiny_generator, tiny_vae
from helpers.fresh import fresh
from safetensors.torch import load_file, save_file

import gspn
from gspn.layers import GSPN2d
from gspn.models.generator import GSPNTransformer2DModel, create_generator, generator_names

ONE = torch.tensor([1])
PARAMETERS = {
    "GSPN-S/2": 20_151_812,
    "GSPN-B/2": 144_016_356,
    "GSPN-L/2": 465_230_660,
    "GSPN-XL/2": 723_513_260,
}


def inputs(batch=2, channels=3, height=8, width=8, **more):
    return dict(
        hidden_states=torch.randn(batch, channels, height, width),
        timestep=torch.arange(batch) * 300 + 7,
        class_labels=torch.arange(batch) % 5,
        **more,
    )


# -- sizes --


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameters_of_the_published_sizes(name, parameters):
    with torch.device("meta"):
        model = gspn.create_generator(name, num_classes=1000, sample_size=32, skip=True)
    assert isinstance(model, gspn.GSPNTransformer2DModel)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.device("meta"):
        lean = create_generator(name, skip=False)
        quarter = create_generator(name.replace("/2", "/4"))
    width, proxy = model.config.hidden_size, model.config.hidden_size // 16
    # a skip gate is a projection of proxy to channels for each of the four directions, in each block
    gates = len(model.blocks) * 4 * proxy * width
    assert parameters - sum(p.numel() for p in lean.parameters()) == gates
    assert sum(p.numel() for p in quarter.parameters()) - parameters == 12 * 4 * width + 12 * 8 * (width + 1)


def test_without_the_skip_gate_it_is_as_large_as_the_papers():
    """137.77M, 444.71M, 691.71M: facts of the paper's training code."""
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in create_generator(f"GSPN-{n}/2", skip=False).parameters()) for n in ("B", "L", "XL")
        ]
    assert [round(count / 1e6, 2) for count in counts] == [137.77, 444.71, 691.71]


def test_names():
    names = generator_names()
    assert {"GSPN-S/2", "GSPN-B/4", "GSPN-XL/4", "GSPN-micro/2", "GSPN-DiT-micro/4", "GSPN-DiT-XL/2"} <= set(names)
    assert len(set(names)) == len(names) == 20
    model = create_generator("GSPN-micro/4", num_classes=3, sample_size=16, in_channels=1, depth=2, hidden_size=32)
    assert model.config.patch_size == 4 and model.config.depth == 2 and model.config.in_channels == 1
    assert model(**inputs(channels=1)).sample.shape == (2, 2, 8, 8)
    assert all(block.gspn.segment is None for block in model.blocks)
    with torch.device("meta"):
        published = create_generator("GSPN-S/2")
    assert [block.gspn.segment for block in published.blocks] == [2] * 23 + [None] * 2
    with pytest.raises(ValueError, match="generator 'DiT-XL/2', did you mean 'GSPN-DiT-XL/2'"):
        create_generator("DiT-XL/2")


# -- shapes --


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 14), (14, 4), (2, 2), (2, 6), (32, 2), (22, 26)])
@pytest.mark.parametrize("patch", [1, 2])
def test_any_size(height, width, patch):
    model = tiny_generator(patch_size=patch)
    given = inputs(height=height, width=width)
    output = model(**given).sample
    assert output.shape == (2, 6, height, width) and output.isfinite().all()
    assert torch.equal(model(**given, return_dict=False)[0], output)


def test_outputs_are_where_their_inputs_are():
    """A patch's prediction depends on that patch more than on another: nothing is transposed or displaced."""
    model = tiny_generator(global_blocks=0, segment=1)
    given = inputs(1, height=8, width=12)
    changed = dict(given, hidden_states=given["hidden_states"].clone())
    changed["hidden_states"][..., 2:4, 8:10] += 1
    difference = (model(**changed).sample - model(**given).sample).abs().sum((0, 1))
    strongest = divmod(int(difference.argmax()), 12)
    assert 2 <= strongest[0] < 4 and 8 <= strongest[1] < 10


def test_pixels_of_a_patch_are_in_their_places():
    """proj_out's rows are (channel, row, column), as the patch embedding's weights are."""
    model = tiny_generator(in_channels=1, learn_sigma=False)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.copy_(torch.arange(4.0))
    output = model(**inputs(1, 1, 4, 6)).sample[0, 0]
    assert torch.equal(output, torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(2, 3))


def test_the_last_layer_is_shifted_and_scaled():
    model, given, shift = tiny_generator(patch_size=1), inputs(), torch.randn(32)
    plain = []
    model.norm.register_forward_hook(lambda module, args, out: plain.append(out))
    with torch.no_grad():
        model.modulation.weight.zero_()
        model.modulation.bias.copy_(torch.cat([shift, torch.full((32,), -0.25)]))
        output = model(**given).sample
        expected = model.proj_out((plain[0] * 0.75).permute(0, 2, 3, 1) + shift).permute(0, 3, 1, 2)
    torch.testing.assert_close(output, expected)


def test_the_batch_does_not_mix():
    model, given = tiny_generator(), inputs(3)
    for i in range(3):
        alone = model(**{name: value[i : i + 1] for name, value in given.items()}).sample
        torch.testing.assert_close(alone[0], model(**given).sample[i], atol=1e-5, rtol=1e-5)


# -- what the scan reaches --


def reach(model, height, width):
    """The places of the map that the prediction at the first place depends on."""
    x = torch.randn(1, 3, height, width, requires_grad=True)
    model(x, ONE, ONE).sample[0, :, 0, 0].sum().backward()
    return x.grad.abs().sum((0, 1)) > 0


@pytest.mark.parametrize(("height", "width"), [(40, 40), (6, 70), (70, 6)])
def test_the_last_blocks_are_global_at_any_size(height, width):
    whole = reach(tiny_generator(), height, width)
    assert whole.all()
    local = reach(tiny_generator(global_blocks=0), height, width)
    assert local[:4, :4].all() and not local[-1, -1] and local.float().mean() < 0.7


def test_which_blocks_are_global():
    def segments(**config):
        with torch.device("meta"):
            model = GSPNTransformer2DModel(**config)
        return [module.segment for module in model.modules() if isinstance(module, GSPN2d)]

    assert segments(depth=6, hidden_size=16) == [2] * 5 + [None] * 2
    assert segments(depth=4, hidden_size=16, segment=3, global_blocks=1) == [3] * 4 + [None]
    assert segments(depth=2, hidden_size=16, global_blocks=0) == [2] * 3
    assert segments(depth=2, hidden_size=16, global_blocks=3) == [None] * 3


def test_blocks_of_the_second_half_are_joined_with_their_counterparts():
    model, kept, joined = tiny_generator(depth=4), [], []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: kept.append(out[0]) if i < 2 else None)
        block.register_forward_pre_hook(lambda m, args, i=i: joined.append(args[2]) if i > 2 else None)
    model(**inputs())
    assert [block.join is not None for block in model.blocks] == [False, False, False, True, True]
    assert joined[0] is kept[1] and joined[1] is kept[0]


# -- classes and timesteps --


def test_class_and_timestep_count():
    model, given = tiny_generator(), inputs()
    output = model(**given).sample
    for change in ({"class_labels": torch.tensor([3, 1])}, {"timestep": torch.tensor([8, 307])}):
        other = model(**given | change).sample
        assert (other[0] - output[0]).abs().max() > 1e-3
        torch.testing.assert_close(other[1], output[1], atol=1e-5, rtol=1e-5)
    assert (model(**given | {"class_labels": torch.tensor([5, 5])}).sample - output).abs().amax((1, 2, 3)).min() > 1e-3


def test_classes_are_dropped_in_training_only():
    model = tiny_generator(class_dropout_prob=0.4)
    given = dict(hidden_states=torch.randn(1, 3, 2, 2).expand(400, -1, -1, -1), timestep=ONE.expand(400))
    given["class_labels"] = torch.full((400,), 2)
    with torch.no_grad():
        named, null = (model(**given | {"class_labels": torch.full((400,), label)}).sample[0] for label in (2, 5))
        assert (model(**given).sample - named).abs().max() < 1e-5
        output = model.train()(**given).sample
    dropped = (output - null).abs().amax((1, 2, 3)) < 1e-5
    assert ((output - named).abs().amax((1, 2, 3)) < 1e-5)[~dropped].all()
    assert 120 < dropped.sum() < 200  # 160 +- 4 standard deviations


def test_a_new_model_predicts_nothing_and_its_residual_keeps_its_scale():
    model = GSPNTransformer2DModel(**TINY | dict(depth=8), sample_size=8, num_classes=5)
    assert not model(**inputs(channels=4)).sample.any()
    scales = []
    model.norm.register_forward_pre_hook(lambda module, args: scales.append(args[0].std()))
    model(**inputs(channels=4))
    assert 0.05 < scales[0] < 5


# -- training --


def gradients(model, given):
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**given).sample
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients():
    model, given = tiny_generator(depth=4, drop_path=0.3).train(), inputs(4)
    given["hidden_states"].requires_grad_()
    plain = gradients(model, given)
    assert all(gradient is not None and gradient.any() for gradient in plain.values())
    calls = []
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_gradient_checkpointing()
    again = gradients(model, given)
    assert len(calls) == 2  # forward, and once more in the backward pass
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
    model.disable_gradient_checkpointing()
    gradients(model, given)
    assert len(calls) == 3


def test_bfloat16_and_autocast():
    model, given = tiny_generator(), inputs()
    output = model(**given).sample
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**given).sample
    assert output.dtype == torch.float32 and (mixed.float() - output).abs().max() < 0.1 * output.abs().max()
    half = model.to(torch.bfloat16)(**given | {"hidden_states": given["hidden_states"].bfloat16()}).sample
    assert half.dtype == torch.bfloat16 and (half.float() - output).abs().max() < 0.1 * output.abs().max()


# -- bad input --


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(class_labels=torch.tensor([0, 6])), r"labels.*0 to 5.*5 is the null class.*\[6\]"),
        (dict(class_labels=torch.tensor([-1, 2])), r"labels.*0 to 5.*\[-1\]"),
        (dict(hidden_states=torch.zeros(2, 3, 8, 7)), "patch of 2.*8x7"),
        (dict(hidden_states=torch.zeros(2, 3, 0, 8)), "patch of 2.*0x8"),
        (dict(hidden_states=torch.zeros(2, 4, 8, 8)), r"\(B,3,H,W\).*\(2, 4, 8, 8\)"),
        (dict(hidden_states=torch.zeros(3, 8, 8)), r"\(B,3,H,W\).*\(3, 8, 8\)"),
        (dict(class_labels=None), "class_labels.*None"),
        (dict(timestep=None), "timestep.*None"),
        (dict(cross_attention_kwargs={"scale": 1}), r"cross_attention_kwargs.*\['scale'\]"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_generator()(**inputs() | change)


def test_without_a_null_class_the_last_class_is_the_last():
    model = tiny_generator(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match=r"0 to 4; got \[5\]"):
        model(**inputs() | {"class_labels": torch.tensor([4, 5])})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(depth=3), "depth.*even.*3"),
        (dict(depth=0), "depth.*positive.*0"),
        (dict(hidden_size=1.5), r"hidden_size.*1\.5"),
        (dict(num_classes=0), "num_classes.*0"),
        (dict(sample_size=9), "sample_size.*2.*9"),
        (dict(global_blocks=4), "global_blocks.*3.*4"),
        (dict(class_dropout_prob=1.0), r"class_dropout_prob.*1\.0"),
        (dict(prediction_type="flow"), "prediction_type.*'flow'"),
        (dict(out_channels=4), "out_channels.*6.*4"),
        (dict(segment=0), "segment"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        GSPNTransformer2DModel(**dict(sample_size=8, in_channels=3, num_classes=5) | TINY | config)


# -- saving --


def test_saved_and_loaded_it_is_the_same(tmp_path):
    options = dict(segment=None, proxy_dim=3, skip=False, center=True)
    model = tiny_generator(**options, prediction_type="v_prediction", learn_sigma=False)
    model.save_pretrained(tmp_path)
    loaded, info = GSPNTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == [] and not loaded.training
    hidden = ("_name_or_path", "_use_default_values")
    assert {k: v for k, v in loaded.config.items() if k not in hidden} == {
        k: v for k, v in model.config.items() if k not in hidden
    }
    given = inputs()
    assert torch.equal(loaded(**given).sample, model(**given).sample)
    plain = GSPNTransformer2DModel.from_pretrained(tmp_path, center=False)
    assert not torch.equal(plain(**given).sample, model(**given).sample)
    half = GSPNTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_weights_of_another_architecture_are_refused(tmp_path):
    config = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, num_embeds_ada_norm=5, sample_size=8)
    DiTTransformer2DModel(**config).save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel.*GSPNTransformer2DModel"):
        GSPNTransformer2DModel.from_pretrained(tmp_path / "dit")
    tiny_generator().save_pretrained(tmp_path / "gspn")
    settings = json.loads((tmp_path / "gspn/config.json").read_text())
    weights = load_file(next((tmp_path / "gspn").glob("*.safetensors")))
    for change, message in (
        (dict(depth=4), r"lacks blocks\.3"),
        (dict(skip=False), r"also has blocks\.0\.gspn"),
        (dict(hidden_size=48), "size|shape"),
    ):
        (tmp_path / "gspn/config.json").write_text(json.dumps(settings | change))
        with pytest.raises((ValueError, RuntimeError), match=message):
            GSPNTransformer2DModel.from_pretrained(tmp_path / "gspn")
    (tmp_path / "gspn/config.json").write_text(json.dumps(settings))
    del weights["norm.weight"]
    save_file(weights, next((tmp_path / "gspn").glob("*.safetensors")), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks norm\.weight"):
        GSPNTransformer2DModel.from_pretrained(tmp_path / "gspn")


def test_names_of_the_weights_are_frozen():
    names = list(tiny_generator(depth=2).state_dict())
    block = ["norm.weight", "norm.bias", "in_proj.weight", "dwconv.weight", "dwconv.bias"]
    block += ["ffn.in_proj.weight", "ffn.dwconv.weight", "ffn.out_proj.weight"]
    expected = {f"blocks.{i}.{name}" for i in range(3) for name in block}
    expected |= {"blocks.2.join.weight", "blocks.2.join.bias", "norm.weight", "norm.bias"}
    expected |= {f"{part}.{kind}" for part in ("patch_embed", "modulation", "proj_out") for kind in ("weight", "bias")}
    expected |= {f"embed.timestep_embedder.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    expected |= {"embed.class_embedder.embedding_table.weight"}
    assert {name for name in names if ".gspn." not in name} == expected


# -- diffusers' own pipeline --


def test_the_pipeline_of_dit_runs_with_it(tmp_path):
    model = tiny_generator(in_channels=4, num_classes=1000)
    pipeline = DiTPipeline(model, tiny_vae(), DDIMScheduler(), id2label={0: "tench", 999: "toilet tissue"})
    pipeline.set_progress_bar_config(disable=True)
    call = dict(class_labels=pipeline.get_label_ids(["tench", "toilet tissue"]), num_inference_steps=2)
    images = pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    unguided = pipeline(**call, generator=torch.Generator().manual_seed(0), guidance_scale=1, output_type="pt").images
    assert (images - unguided).abs().max() > 1e-3
    pipeline.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.transformer, GSPNTransformer2DModel)
    again = loaded(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(images, again)


def test_without_diffusers_the_extra_is_named():
    code = (
        "import sys; sys.modules['diffusers'] = None; import gspn; gspn.create_model\n"
        "for name in ('create_generator', 'GSPNPipeline'):\n"
        "    try: getattr(gspn, name)\n"
        "    except ImportError as error: print(error)"
    )
    result = fresh(code)
    assert result.stdout.count('pip install "gspn[diffusion]"') == 2


def test_lively_makes_the_tests_see_something():
    model = GSPNTransformer2DModel(**TINY, sample_size=8, in_channels=3, num_classes=5)
    assert lively(model)(**inputs()).sample.std() > 0.1
