"""High resolution: savers of memory and what they save, going on after a kill."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL
from helpers.high_resolution import FEW, latents_of
from helpers.stable_diffusion import tiny_ip_adapter, tiny_sd
from torch import nn

import gspn
from gspn import files
from gspn.stable_diffusion.highres import HighResPipeline, Savers, memory, pipeline, savers, state
from gspn.stable_diffusion.highres.images import decode
from gspn.stable_diffusion.highres.passes import Guidance

pytestmark = pytest.mark.usefixtures("no_estimates")


# -- savers and memory --


@pytest.mark.parametrize("name", ["sequential_guidance", "chunked_feed_forward", "parked_residuals"])
def test_savers_of_the_unet_change_nothing_but_memory(pipe, name, monkeypatch):
    monkeypatch.setattr(savers, "CHUNK", 50)  # 12x16 places are 192, 6x8 are 48
    plain = latents_of(pipe)
    seen = []
    handles = [
        pipe.unet.mid_block.register_forward_pre_hook(lambda module, args: seen.append(len(args[0]))),
        pipe.unet.down_blocks[0]
        .attentions[0]
        .transformer_blocks[0]
        .ff.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1])),
    ]
    try:
        saved = latents_of(pipe, **{name: True})
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(saved[1], plain[1], atol=2e-5, rtol=1e-4)
    assert (48 in seen) == (name == "chunked_feed_forward") and (seen[-1] == 1) == (name == "sequential_guidance")
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    assert block._chunk_size is None and not any(b._forward_hooks for b in pipe.unet.down_blocks)


def test_pieces_of_the_feed_forward_divide_any_map(sd, monkeypatch):
    monkeypatch.setattr(savers, "CHUNK", 10)
    unet, text = sd.unet, torch.randn(1, 8, 16)
    for height, width in ((7, 5), (1, 13), (2, 4)):
        x = torch.randn(1, 4, height, width)
        with torch.no_grad():
            expected = unet(x, 3, text).sample
            with savers.saving(sd, Savers(chunked_feed_forward=True)):
                torch.testing.assert_close(unet(x, 3, text).sample, expected, atol=1e-5, rtol=1e-4)


def test_tiles_of_the_vae(sd, monkeypatch):
    monkeypatch.setattr(savers, "TILE", 24)
    vae, z = sd.vae, torch.randn(1, 4, 32, 40)
    settings = (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size)
    whole = decode(sd, z)
    sizes = []
    handle = vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
    with savers.saving(sd, Savers(vae_tiling=True)):
        tiled = decode(sd, z)
    handle.remove()
    assert tiled.shape == whole.shape and max(sizes) == (12, 12) and len(sizes) > 4
    assert 0 < (tiled - whole).abs().mean() < 0.5 * whole.std()
    assert settings == (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size)


@pytest.mark.estimates
def test_the_most_that_is_held_at_once():
    model = nn.Sequential(nn.Linear(10, 100), nn.ReLU(inplace=True), nn.Linear(100, 10), nn.Linear(10, 10))
    x = torch.empty(7, 10, device="meta")
    assert memory.peak_bytes(model, "forward", x) == 4 * 7 * (100 + 10)
    assert memory.peak_bytes(model, "forward", x.half(), dtype=torch.float16) == 2 * 7 * (100 + 10)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())  # as they were


@pytest.mark.estimates
@pytest.mark.parametrize("form", [None, "pure", "qkv"])
def test_the_estimate_is_linear_and_savers_lower_it(form, monkeypatch):
    monkeypatch.setattr(savers, "CHUNK", 2**11)
    pipe = tiny_sd(layers_per_block=2)
    guidance = Guidance(pipe, "red fox", None, 7.0, {}, (16, 16))

    def need(side, **on):
        return memory.unet_bytes(pipe, side, side, Savers(**on), guidance.on_meta)

    with nullcontext() if form is None else gspn.swap(pipe, form=form, init="random"):
        large = need(256)
        assert 3.9 < large / need(128) < 4.1  # attention too: fused kernels keep no matrix of all pairs
        if form is None:
            chunked = need(256, chunked_feed_forward=True)
            assert need(256, sequential_guidance=True) < 0.6 * large and chunked < 0.9 * large
            assert need(256, chunked_feed_forward=True, parked_residuals=True) < 0.98 * chunked
            assert memory.vae_bytes(pipe, 1024, 1024, True) < 0.8 * memory.vae_bytes(pipe, 1024, 1024, False)


@pytest.mark.estimates
@pytest.mark.parametrize("form", ["pure", "qkv"])
@pytest.mark.parametrize("named", ["cpu", "triton"])
def test_the_estimate_takes_any_backend(form, named):
    """Native kernels, which layers may name, do not run on "meta"."""
    pipe = tiny_sd()
    guidance = Guidance(pipe, "red fox", None, 7.0, {}, (16, 16))
    found = []
    for backend in (None, named):
        with gspn.swap(pipe, form=form, backend=backend, init="random") as swapped:
            found.append(memory.unet_bytes(pipe, 32, 32, Savers(), guidance.on_meta))
            for layer in swapped.layers.values():
                assert {module.backend for module in layer.modules() if hasattr(module, "backend")} == {backend}
    assert found[0] == found[1] > 0


@pytest.mark.estimates
def test_a_vae_without_tiling():
    pipe = tiny_sd()
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    sizes = dict(down_block_out_channels=(8, 8), up_block_out_channels=(8, 8), norm_num_groups=4)
    pipe.vae = AsymmetricAutoencoderKL(**kinds, **sizes).eval()
    high = HighResPipeline(pipe)
    with pytest.raises(ValueError, match=r"AsymmetricAutoencoderKL.* no tiling: .*vae_tiling=False or None"):
        high.plan(32, 32, vae_tiling=True)
    assert not high.plan(stages=[(16, 16), (1024, 1024)])[-1].savers.vae_tiling  # where tiles would be faster
    with pytest.raises(ValueError, match=r"smaller size$"):  # not: or allow vae_tiling
        high.plan(stages=[(256, 256)], memory_mib=1)
    assert high("red fox", 32, 32, **FEW).images[0].size == (32, 32)


def chosen(pipe, monkeypatch, room, by_offload=0, **wanted):
    """What `choose` does where each saver of the UNet saves 100 bytes of 1000, and tiles 300 of the VAE's 900."""
    of_unet = ("sequential_guidance", "chunked_feed_forward", "parked_residuals")
    monkeypatch.setattr(memory, "MIB", 1)
    monkeypatch.setattr(
        memory, "unet_bytes", lambda pipe, h, w, on, conditions: 1000 - 100 * sum(getattr(on, n) for n in of_unet)
    )
    monkeypatch.setattr(memory, "vae_bytes", lambda pipe, h, w, tiling: 600 if tiling else 900)
    wanted = Savers(**dict.fromkeys(savers.SAVERS) | wanted)
    found, need = memory.choose(pipe, (64, 64), wanted, (), None, torch.device("cuda"), room, by_offload)
    return [name for name in savers.SAVERS if getattr(found, name)], need


def test_savers_come_on_where_they_are_needed_and_no_sooner(sd, monkeypatch):
    sequential, chunked, parked = "sequential_guidance", "chunked_feed_forward", "parked_residuals"
    assert chosen(sd, monkeypatch, 1000) == ([], 1000)
    assert chosen(sd, monkeypatch, 999) == ([sequential], 900)
    assert chosen(sd, monkeypatch, 899) == (["vae_tiling", sequential, chunked], 800)
    assert chosen(sd, monkeypatch, 700) == (["vae_tiling", sequential, chunked, parked], 700)
    assert chosen(sd, monkeypatch, 600, 100) == (["vae_tiling", sequential, chunked, parked, "offload"], 700)
    assert chosen(sd, monkeypatch, 900, **{sequential: False}) == ([chunked], 900)
    assert chosen(sd, monkeypatch, 2000, **{parked: True, "vae_tiling": True}) == (["vae_tiling", parked], 900)
    with pytest.raises(ValueError, match=r"64x64 .*UNet 700 MiB.*VAE 600 MiB .* 650 MiB"):
        chosen(sd, monkeypatch, 600, 50)
    with pytest.raises(ValueError, match=r"600 MiB .*smaller size.*sequential_guidance, offload"):
        chosen(sd, monkeypatch, 600, 100, **{sequential: False, "offload": False})
    assert memory.tiles_are_faster(sd.vae, 1024, 1024) and not memory.tiles_are_faster(sd.vae, 256, 256)


def test_without_an_estimate_savers_go_by_size(sd, monkeypatch):
    monkeypatch.setattr(memory, "is_offloaded", lambda pipe: True)
    assert chosen(sd, monkeypatch, 1) == ([], None)
    monkeypatch.setattr(memory, "MANY_PIXELS", 1000)
    names, need = chosen(sd, monkeypatch, 1, chunked_feed_forward=False)
    assert names == ["vae_tiling", "sequential_guidance", "parked_residuals"] and need is None


def test_the_guidance_of_the_first_stage_is_the_pipelines(sd):
    first, second = HighResPipeline(sd).plan(32, 32, sequential_guidance=True, vae_tiling=True)
    assert first.savers.told() == " (vae tiling)" and second.savers.told() == " (vae tiling, sequential guidance)"
    assert not HighResPipeline(sd).plan(32, 32, sequential_guidance=True, guidance_scale=1)[1].savers.told()


@pytest.mark.estimates
def test_a_plan_takes_the_options_that_the_unet_cannot_do_without():
    pipe, options = tiny_sd(), dict(ip_adapter_image_embeds=[torch.randn(2, 1, 6)])
    pipe.unet._load_ip_adapter_weights([tiny_ip_adapter(pipe.unet)])
    assert HighResPipeline(pipe).plan(16, 16, **options)[0].memory_mib > 0


def test_what_does_not_fit_is_refused_before_any_work(sd):
    ran = []
    handle = sd.unet.register_forward_pre_hook(lambda module, args: ran.append(1))
    try:
        with pytest.raises(ValueError, match=r"smaller size$"):  # no saver helps on a CPU
            HighResPipeline(sd)("red fox", 256, 256, memory_mib=1)
    finally:
        handle.remove()
    assert not ran


# -- going on --


class Killed(Exception):
    pass


def test_two_at_work_in_one_workdir(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    call = dict(prompt="green owl", stages=[(16, 16)], **FEW, output_type="latent", workdir=tmp_path)

    def second(*_):
        with pytest.raises(ValueError, match=r"another gspn \(process \d+ on "):
            HighResPipeline(pipe)(**call)

    first = HighResPipeline(pipe)(**call, callback_on_stage_end=second)
    assert torch.equal(HighResPipeline(pipe)(**call).images, first.images)


def test_a_killed_run_goes_on_to_the_same_bits(pipe, tmp_path):
    call = dict(prompt="green owl", stages=[(16, 16), (24, 24), (32, 32)], **FEW, output_type="np")
    whole = HighResPipeline(pipe)(**call)

    def kill(pipe, index, images):
        if index == 1:
            raise Killed

    with pytest.raises(Killed):
        HighResPipeline(pipe)(**call, workdir=tmp_path / "run", callback_on_stage_end=kill)
    sizes = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[2]))
    try:
        resumed = HighResPipeline(pipe)(**call | {"seed": None}, workdir=tmp_path / "run")
        assert set(sizes) == {16} and resumed.seed == 3
        again = HighResPipeline(pipe)(**call, workdir=tmp_path / "run")
    finally:
        handle.remove()
    assert set(sizes) == {16}
    for one, two, three in zip(whole.stages, resumed.stages, again.stages, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    folders = sorted(path.name for path in (tmp_path / "run").glob("[!.]*"))
    assert folders == ["highres.json", "stage-0-16x16", "stage-1-24x24", "stage-2-32x32"]
    from PIL import Image

    with Image.open(tmp_path / "run" / "stage-2-32x32" / "image.png") as image:
        np.testing.assert_array_equal(np.asarray(image), (whole.images[0] * 255).round().astype(np.uint8))


def test_a_kill_within_a_stage_loses_that_stage_alone(sd, tmp_path):
    def kill(pipe, step, t, given):
        if given["stage"] == 1 and step == 1:
            raise Killed

    call = dict(prompt="green owl", stages=[(16, 16), (24, 24)], **FEW, output_type="latent", workdir=tmp_path)
    with pytest.raises(Killed):
        HighResPipeline(sd)(**call, callback_on_step_end=kill)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["highres.json", "stage-0-16x16"]
    result = HighResPipeline(sd)(**call)
    assert torch.equal(result.images, HighResPipeline(sd)(**call | {"workdir": None}).images)


def test_a_folder_without_a_stage_belongs_to_no_image_yet(sd, tmp_path):
    def kill(pipe, step, t, given):
        raise Killed

    call = dict(height=16, width=16, **FEW, output_type="latent", workdir=tmp_path)
    with pytest.raises(Killed):
        HighResPipeline(sd)("owl", **call, callback_on_step_end=kill)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["highres.json"]
    HighResPipeline(sd)("fox", **call)
    with pytest.raises(ValueError, match='prompt "fox", now "owl"'):
        HighResPipeline(sd)("owl", **call)
    with pytest.raises(ValueError, match=r"workdir.*highres\.json"):
        HighResPipeline(sd)("owl", **call | {"workdir": tmp_path / "highres.json"})


def test_settings_of_the_models_that_are_no_weights_count(tmp_path):
    pipe = tiny_sd()
    high, call = HighResPipeline(pipe), dict(prompt="owl", height=16, width=16, **FEW, workdir=tmp_path)
    high(**call)
    pipe.enable_freeu(0.9, 0.2, 1.5, 1.6)
    with pytest.raises(ValueError, match=r"another image: pipeline\.unet "):
        high(**call)
    pipe.disable_freeu()
    pipe.vae.register_to_config(scaling_factor=0.25)
    with pytest.raises(ValueError, match=r"another image: pipeline\.vae "):
        high(**call)
    pipe.vae.register_to_config(scaling_factor=0.5)
    high(**call)


def test_layers_that_are_adapted_and_tiles_count(tmp_path):
    pipe = tiny_sd()
    gspn.swap(pipe, segment=2, init="random")
    high, call = HighResPipeline(pipe), dict(prompt="owl", height=16, width=16, **FEW, workdir=tmp_path)
    for module in (*pipe.unet.modules(), *pipe.vae.modules()):
        assert set(state._settings_of(module)) <= {*state.SETTINGS}  # as in older folders
    high(**call)
    with gspn.adapt(pipe, (32, 32)), pytest.raises(ValueError, match=r"another image: pipeline\.unet "):
        high(**call)
    pipe.vae.enable_tiling()
    with pytest.raises(ValueError, match=r"another image: pipeline\.vae "):
        high(**call)
    tiled = state.fingerprint(pipe)
    pipe.vae.tile_latent_min_size += 1
    assert state.fingerprint(pipe) != tiled
    pipe.vae.disable_tiling()
    high(**call)


def test_the_home_in_a_workdir(sd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    HighResPipeline(sd)("owl", 16, 16, **FEW, workdir="~/owl")
    assert (tmp_path / "owl" / "highres.json").is_file()


def test_every_weight_and_word_counts(tmp_path):
    pipe = tiny_sd()
    high, call = HighResPipeline(pipe), dict(prompt="owl", height=16, width=16, **FEW, workdir=tmp_path)
    high(**call)
    weight = pipe.unet.conv_in.weight.data.view(-1)
    last = weight[-1].item()
    weight[-1] += 1
    with pytest.raises(ValueError, match=r"another image: pipeline\.unet "):
        high(**call)
    weight[-1] = last
    pipe.tokenizer.model_max_length -= 1
    with pytest.raises(ValueError, match=r"another image: pipeline\.tokenizer "):
        high(**call)
    pipe.tokenizer.model_max_length += 1
    high(**call)


@pytest.mark.slow
def test_a_pipeline_is_the_same_in_every_process(tmp_path):
    """What diffusers notes of a config it keeps in the order of a set, which differs from process to process."""
    tiny_sd().save_pretrained(tmp_path)
    code = (
        "import sys; from diffusers import StableDiffusionPipeline;"
        "from gspn.stable_diffusion.highres.state import fingerprint;"
        "print(sorted(fingerprint(StableDiffusionPipeline.from_pretrained(sys.argv[1])).items()))"
    )
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    for name in ("mid_block_add_attention", "use_quant_conv", "force_upcast", "out_channels"):
        del config[name]  # as published configs, which are older
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    told = {
        subprocess.run(
            [sys.executable, "-c", code, tmp_path],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in "12"
    }
    assert len(told) == 1 and b"AutoencoderKL 2:" in told.pop()


def test_a_folder_that_an_older_version_began_goes_on(tmp_path, monkeypatch):
    """Its digests of the pipeline differed from process to process: they are not compared, which is told."""
    pipe = tiny_sd()
    high, call = HighResPipeline(pipe), dict(prompt="owl", height=16, width=16, **FEW, workdir=tmp_path)
    made = high(**call, output_type="np")
    record = json.loads((tmp_path / "highres.json").read_text())
    record["asked"]["pipeline"] = {"unet": "UNet2DConditionModel 0123456789abcdef"}
    (tmp_path / "highres.json").write_text(json.dumps(record))
    told = []
    monkeypatch.setattr(pipeline.logger, "warning", lambda text, *values: told.append(text % values))
    np.testing.assert_array_equal(high(**call, output_type="np").images, made.images)
    assert len(told) == 1 and "not checked" in told[0]
    with pytest.raises(ValueError, match='prompt "owl", now "fox"'):
        high(**call | {"prompt": "fox"})


def test_a_folder_of_another_image_is_refused(tmp_path):
    pipe = tiny_sd()
    high, call = HighResPipeline(pipe), dict(prompt="owl", height=24, width=24, **FEW, workdir=tmp_path)
    high(**call)
    for change, message in (
        (dict(prompt="fox"), 'prompt "owl", now "fox"'),
        (dict(seed=4), "seed 3, now 4"),
        (dict(guidance_scale=2.0), "guidance_scale 7.0, now 2.0"),
        (dict(width=32), "stages"),
        (dict(sequential_guidance=True), "savers"),
        (dict(eta=0.5), "options"),
    ):
        with pytest.raises(ValueError, match=rf"another image: .*{message}"):
            high(**call | change)
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1
    with pytest.raises(ValueError, match="another image: pipeline"):
        high(**call)
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] -= 1
    (tmp_path / "stage-0-16x16" / "latents.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"latents\.safetensors .*remove"):
        high(**call)
    record = json.loads((tmp_path / "highres.json").read_text())
    for change, message in (
        ("{", "is damaged"),
        ({"format": 9}, r"newer gspn \(format 9"),
        (record | {"asked": {}}, "is damaged .*'seed'"),
        (record | {"asked": record["asked"] | {"pipeline": None}}, "is damaged"),
        ({"format": 1, "asked": record["asked"]}, "is damaged .*'chosen'.*: remove it and the stages"),
        (record | {"chosen": {}}, "is damaged .*'savers'"),
        ({"format": 0, "asked": {}}, "is damaged"),
        (record | {"format": "1"}, r"damaged or foreign: its format is '1'"),
        (record | {"asked": record["asked"] | {"seed": "3"}}, "is damaged .*number as seed"),
        (record | {"asked": record["asked"] | {"pipeline": {"a": 3}}}, "is damaged .*texts as digests"),
        (record | {"chosen": {"savers": 3}}, "is damaged"),
        (record | {"chosen": {"savers": record["chosen"]["savers"][:1]}}, "is damaged .*5 savers of each stage"),
        (record | {"chosen": {"savers": [[3] * 5] * 2}}, "is damaged .*True, False or None, got 3"),
    ):
        (tmp_path / "highres.json").write_text(change if isinstance(change, str) else json.dumps(change))
        with pytest.raises(ValueError, match=rf"highres\.json .*{message}"):
            high(**call)
    (tmp_path / "highres.json").unlink()
    with pytest.raises(ValueError, match=r"holds stages but no highres\.json: choose another workdir, or remove them"):
        high(**call | {"prompt": "fox"})
