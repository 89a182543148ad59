"""Runs of a distillation: that they go on exactly, what they leave, what they refuse. Its loss: test_student.py."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers.stable_diffusion import WORDS, ddim, tiny_sd, tiny_sdxl
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import gspn
from gspn.cli import app
from gspn.options import OptionError
from gspn.options.distill import PRESET, DistillOptions
from gspn.tasks.distill import Setup, distill, resume_distillation
from gspn.tasks.student import Distillation
from gspn.tasks.text_to_image import TextToImage, open_text_to_image
from gspn.train.run import Run, RunError

SMALL = dict(epochs=1, batch_size=4, workers=0, sample_every=0, precision="fp32", val_fraction=0.2)


def lively(pipe):
    """The same pipeline with norms that shift, as trained ones do: the pure form starts from that."""
    torch.manual_seed(1)
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.bias, std=0.3)
    return pipe


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a tiny SD and a tiny SDXL."""
    path = tmp_path_factory.mktemp("bases")
    lively(tiny_sd(scheduler=ddim(prediction_type="v_prediction"))).save_pretrained(path / "sd")
    lively(tiny_sdxl()).save_pretrained(path / "xl")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with ten captioned images."""
    path = tmp_path_factory.mktemp("photos")
    rows = []
    for i in range(10):
        pixels = np.random.RandomState(i).randint(0, 255, (16, 20, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"{WORDS[i]} {WORDS[3 * i % 10]}"})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RUN = dict(
    SMALL, epochs=2, sample_every=1, sample_captions=2, sample_steps=2, guidance=2.0, flip=True, lr=1e-2, ema=0.5
)


@pytest.fixture(scope="module")
def whole(bases, photos, tmp_path_factory):
    """A run that nothing stopped."""
    path = tmp_path_factory.mktemp("distillation") / "run"
    distill(photos, path, DistillOptions(base=str(bases / "sd"), **RUN))
    return path


def test_the_largest_size_is_tried_before_a_run_is_made(bases, photos, tmp_path, monkeypatch):
    def latents(teacher, images, *, draw=True):
        raise RuntimeError(f"no memory for {tuple(images.shape)}")

    monkeypatch.setattr(TextToImage, "latents", latents)
    options = DistillOptions(base=str(bases / "sd"), sizes=(0.5, 3), **SMALL)
    with pytest.raises(OptionError, match=r"tried with 48x48: no memory for \(1, 3, 48, 48\)"):
        distill(photos, tmp_path / "run", options)
    assert not (tmp_path / "run").exists()


def test_a_run_at_several_sizes(bases, photos, tmp_path, monkeypatch):
    """Of images as large as the largest; its validation is at the run's size; it goes on with the same sizes."""
    prepare, seen, stop = Distillation.prepare, [], [3]

    def watched(task, batch):
        if len(seen) == stop[0]:
            raise KeyboardInterrupt
        assert batch["image"].shape[2:] == (32, 32)
        prepared = prepare(task, batch)
        seen.append((tuple(prepared["start"].shape[2:]), prepared["trust"][0].item()))
        return prepared

    monkeypatch.setattr(Distillation, "prepare", watched)
    options = DistillOptions(
        base=str(bases / "sd"), sizes=(1, 2), away_weight=0.5, proxy_dim=3, save_every="1", **SMALL | {"epochs": 3}
    )
    stop[0] = 100
    distill(photos, tmp_path / "whole", options)
    whole, seen[:] = list(seen), []
    assert len({size for size, _ in whole}) > 1 and {size for size, _ in whole} <= {
        (h, w) for h in (8, 16) for w in (8, 16)
    }
    assert all(trust == (1.0 if size == (8, 8) else 0.5) for size, trust in whole)
    stop[0] = 3
    with pytest.raises(KeyboardInterrupt):
        distill(photos, tmp_path / "run", options)
    stop[0] = 100
    run, _ = resume_distillation(tmp_path / "run")
    assert seen == whole and run.config["options"]["sizes"] == [1, 2]
    ours, theirs = (load_file(tmp_path / each / "gspn_swap.safetensors") for each in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {value.shape[0] for name, value in ours.items() if name.endswith("proxy_proj.weight")} == {3}
    assert "16x16 times 1, 2" in Setup.of(photos, options).describe(
        Setup.of(photos, options).model(torch.device("cpu"))
    )


def test_what_a_run_leaves_behind(whole, bases):
    config, rows = json.loads((whole / "config.json").read_text()), Run.open(whole).metrics
    assert config["task"] == "distillation" and config["prediction_type"] == "v_prediction"
    assert config["image_size"] == [16, 16] and len(config["swap"]["layers"]) == 7
    assert [row["epoch"] for row in rows] == [1, 2] and rows[0]["val_teacher"] == rows[1]["val_teacher"] > 0
    for row in rows:
        assert row["val_loss"] == pytest.approx(row["val_noise"] + 0.5 * row["val_output"] + 0.5 * row["val_feature"])
        assert row["images"] == 2
    for name in ("samples/epoch-0001.png", "samples/epoch-0002.png", "curves.png"):
        with Image.open(whole / name) as picture:
            assert min(picture.size) > 100
    # the layers of the best epoch, averaged, and nothing else; the pipeline takes them
    best = load_file(whole / "checkpoints/best/ema.safetensors")
    saved = load_file(whole / "gspn_swap.safetensors")
    assert {
        f"layers.{n.rpartition('.attn1.')[0].replace('.', '/')}/attn1.{n.rpartition('.attn1.')[2]}" for n in saved
    } == {*best}
    for name, tensor in saved.items():
        place, _, rest = name.rpartition(".attn1.")
        assert torch.equal(best[f"layers.{place.replace('.', '/')}/attn1.{rest}"], tensor)
    pipe = open_text_to_image(bases / "sd").pipe
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'first'; it has best, last"):
        gspn.load_swap(pipe, whole, checkpoint="first")
    with gspn.load_swap(pipe, whole / "gspn_swap.safetensors", checkpoint="last"):
        pass
    for name in ("best", "last"):
        with gspn.load_swap(pipe, whole, checkpoint=name) as swapped:
            kept = load_file(whole / f"checkpoints/{name}/ema.safetensors")
            for layer, module in swapped.layers.items():
                weights = module.state_dict()
                assert all(torch.equal(kept[f"layers.{layer.replace('.', '/')}.{n}"], weights[n]) for n in weights)
    swapped = gspn.load_swap(pipe, whole)
    assert all(torch.equal(saved[f"{n}.{m}"], p) for n, y in swapped.layers.items() for m, p in y.named_parameters())
    assert pipe("red fox", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("stopped_at", [1, 3])
def test_a_stopped_run_goes_on_exactly(whole, bases, photos, tmp_path, monkeypatch, stopped_at):
    prepare, steps = Distillation.prepare, []

    def stops(task, batch):
        if len(steps) == stopped_at:
            raise KeyboardInterrupt
        steps.append(1)
        return prepare(task, batch)

    monkeypatch.setattr(Distillation, "prepare", stops)
    base = shutil.copytree(bases / "sd", tmp_path / "sd")
    with pytest.raises(KeyboardInterrupt):
        distill(photos, tmp_path / "run", DistillOptions(base=str(base), save_every="1", **RUN))
    monkeypatch.undo()
    shutil.rmtree(base)
    resume_distillation(tmp_path / "run", {"base": str(bases / "sd")})  # it was moved
    for part in ("model", "ema", "optimizer"):
        ours, theirs = (load_file(each / f"checkpoints/last/{part}.safetensors") for each in (tmp_path / "run", whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), part
    for name in ("samples/epoch-0001.png", "samples/epoch-0002.png"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["base"]["path"] == config["options"]["base"] == str(bases / "sd")
    assert yaml.safe_load((tmp_path / "run/options.yaml").read_text())["base"] == str(bases / "sd")
    resume_distillation(tmp_path / "run")  # which knows where it is now
    ours, theirs = (load_file(each / "gspn_swap.safetensors") for each in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    clocks = ("seconds", "data_seconds", "images_per_second")
    ours, theirs = (Run.open(each).metrics for each in (tmp_path / "run", whole))
    assert [{k: v for k, v in row.items() if k not in clocks} for row in ours] == [
        {k: v for k, v in row.items() if k not in clocks} for row in theirs
    ]


@pytest.mark.parametrize("keep, stop", [(("lowest",), 1), (2, 1), (2, 0)])
def test_a_run_that_keeps_attentions_goes_on_exactly(bases, photos, tmp_path, monkeypatch, keep, stop):
    """Names and a number, which are ranked; stopped after a checkpoint and before the first."""
    prepare, steps = Distillation.prepare, []
    options = DistillOptions(base=str(bases / "sd"), keep_attention=keep, fit=1, fit_maps=4, save_every="1", **SMALL)
    distill(photos, tmp_path / "whole", options)

    def stops(task, batch):
        if task.loader is not None:  # not in the fit
            if len(steps) == stop:
                raise KeyboardInterrupt
            steps.append(1)
        return prepare(task, batch)

    monkeypatch.setattr(Distillation, "prepare", stops)
    with pytest.raises(KeyboardInterrupt):
        distill(photos, tmp_path / "run", options)
    monkeypatch.undo()
    # Not ranked again, where another machine might come to another result
    monkeypatch.setattr("gspn.tasks.distill.rank", lambda *_, **__: pytest.fail("ranked again"))
    run, _ = resume_distillation(tmp_path / "run")
    kept = run.config["swap"]["kept"]
    assert len(kept) == (2 if keep == 2 else 4) and len(run.config["swap"]["layers"]) == 7 - len(kept)
    ours, theirs = (load_file(tmp_path / each / "gspn_swap.safetensors") for each in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = gspn.load_swap(open_text_to_image(bases / "sd").pipe, tmp_path / "run")
    assert sorted(loaded.kept) == sorted(kept)


def test_what_is_learned_nears_the_teacher(bases, photos, tmp_path):
    """From random layers; on the very images that it is judged by."""
    shutil.copytree(photos, tmp_path / "photos/train")
    shutil.copytree(photos, tmp_path / "photos/val")
    (tmp_path / "photos/train/7.png").write_bytes(b"damaged")
    changes = dict(base=str(bases / "sd"), init="random", epochs=6, lr=1e-2, ema=0.0, noise_weight=0.0, cache=True)
    run, warnings = distill(tmp_path / "photos", tmp_path / "run", DistillOptions(**SMALL | changes))
    first, last = run.metrics[0], run.metrics[-1]
    assert last["val_feature"] < 0.8 * first["val_feature"] and last["val_loss"] < first["val_loss"]
    assert (last["unreadable"], last["unreadable_in_training"], last["images"]) == (0, 1, 10)
    assert len(warnings) == 1 and "1 unreadable image" in warnings[0] and "7.png" in warnings[0]


@pytest.mark.slow
def test_sdxl_in_bfloat16_after_a_fit(bases, photos, tmp_path):
    options = dict(
        form="qkv", segment=2, fit=2, fit_maps=8, precision="bf16", gradient_checkpointing=True, accumulate=2
    )
    run, _ = distill(photos, tmp_path / "run", DistillOptions(base=str(bases / "xl"), **SMALL | options))
    fitted = run.config["swap"]["fitted"]
    assert len(fitted) == 7 and all(after <= before for before, after in fitted.values())
    assert np.isfinite(run.metrics[0]["val_loss"]) and run.metrics[0]["val_feature"] > 0
    saved = load_file(tmp_path / "run/gspn_swap.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}  # though the UNet is in bfloat16
    swapped = gspn.load_swap(open_text_to_image(bases / "xl").pipe, tmp_path / "run")
    assert (swapped.form, swapped.segment) == ("qkv", 2)


# -- what cannot be --


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base": None}, "base: .*pipeline"),
        ({"base": "/nowhere/sd"}, "pipeline /nowhere/sd"),
        ({"size": (16, 20)}, "size.*8.*16x20"),
        ({"fsdp": True}, "fsdp: .* swapped layers"),
        ({"layer_decay": 0.5}, "layer_decay: got 0.5, .* one rate: expected 1"),
        ({"cache": True, "sizes": (1, 2)}, "cache and sizes .*leave cache out"),
        ({"noise_weight": 0.0, "output_weight": 0.0, "feature_weight": 0.0}, "noise_weight.* 0"),
        ({"freeze": ("layers.nothing",)}, r"freeze.*'layers\.nothing'"),
        ({"keep_attention": 2}, "keep_attention: the 2 .*fit"),
        ({"keep_attention": 7, "fit": 1}, "from 1 to 6, .*got 7"),
        ({"keep_attention": ("attn2",)}, "'attn2' matches none of the 7"),
        ({"sizes": (1, 0)}, "sizes takes positive numbers.*got"),
        ({"sizes": "1,big"}, "sizes takes .*0.75,1,1.5, got '1,big'"),
        ({"away_weight": 0.5}, "away_weight .*expected sizes"),
        ({"sizes": (1, 2), "noise_weight": 0.0}, "sizes: noise_weight and away_weight"),
        ({"size": -16}, "size takes N or HxW .*got -16"),
        ({"sample_every": 1, "sample_steps": 2000}, "sample_steps: DDIMScheduler cannot make 2000 .*--sample-every 0"),
    ],
)
def test_bad_options(bases, photos, tmp_path, changes, message):
    with pytest.raises(OptionError, match=message):
        distill(photos, tmp_path / "run", DistillOptions(**SMALL | {"base": str(bases / "sd")} | changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, []),
        ({"fit_maps": 8}, ["--fit-maps .* without --fit"]),
        ({"fit_maps": 8, "fit": 1}, []),
        ({"sample_steps": 9, "guidance": 1.0}, []),
        ({"sample_steps": 9, "sample_every": 0}, ["--sample-steps .*--sample-every 0"]),
        ({"sample_captions": 3, "guidance": 1.0, "sample_every": 0}, ["--sample-captions ", "--guidance "]),
        ({"away_weight": 1.0, "output_weight": 0.0}, []),
        ({"away_weight": 1.0, "output_weight": 0.0, "feature_weight": 0.0}, ["--away-weight .* both 0"]),
        ({"keep": 2}, ["--keep "]),
    ],
)
def test_options_that_do_nothing_are_told(changes, expected):
    notes = DistillOptions(**changes).resolved(PRESET).idle()
    assert len(notes) == len(expected) and all(map(re.search, expected, notes)), notes


@pytest.mark.parametrize(
    "sizes, more, expected",
    [
        ((0.5, 2), {}, ["none of the factors gives 16x16: .* never sees"]),
        ((0.9, 2), {}, []),  # 0.9 gives 16x16, as sides are multiples of 8
        ((1, 1, 2), {}, []),
        ((1, 1.1, 2), {}, ["the factors 1 and 1.1 give the same size, 16x16, .* multiples of 8"]),
        ((0.9,), {"away_weight": 0.5}, ["--away-weight .* another size than 16x16"]),
        ((0.9, 2), {"away_weight": 0.5}, []),
    ],
)
def test_factors_that_do_not_give_what_one_expects_are_told(bases, photos, sizes, more, expected):
    notes = Setup.of(photos, DistillOptions(base=str(bases / "sd"), sizes=sizes, **SMALL, **more)).notes
    notes = [note for note in notes if "sizes" in note and "first image" not in note]  # which is smaller than 32x32
    assert len(notes) == len(expected) and all(map(re.search, expected, notes)), notes


def test_a_unet_that_wants_more_is_told_before_a_run_is_made(photos, tmp_path):
    tiny_sd(class_embed_type="timestep").save_pretrained(tmp_path / "sd")
    with pytest.raises(OptionError, match="16x16: class_labels should be provided"):
        distill(photos, tmp_path / "run", DistillOptions(base=str(tmp_path / "sd"), **SMALL))
    assert not (tmp_path / "run").exists()


def test_pipelines_that_cannot_be_distilled(bases, tmp_path):
    index = json.loads((bases / "sd/model_index.json").read_text())
    shutil.copytree(bases / "sd", tmp_path / "other")
    (tmp_path / "other/model_index.json").write_text(json.dumps(index | {"_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(OptionError, match=r"PixArtAlphaPipeline.*StableDiffusionPipeline"):
        open_text_to_image(tmp_path / "other")
    with pytest.raises(OptionError, match=r"UNet.* 9 .* 4.*VAE.* 4"):
        TextToImage(tiny_sd(in_channels=9), "here")
    with pytest.raises(OptionError, match="time_cond_proj_dim"):
        TextToImage(tiny_sd(time_cond_proj_dim=8), "here")
    from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler

    with pytest.raises(OptionError, match=r"FlowMatchEulerDiscreteScheduler.*betas"):
        TextToImage(tiny_sd(scheduler=FlowMatchEulerDiscreteScheduler()), "here")
    pipe = tiny_sd()
    pipe.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(OptionError, match=r"latents_mean.*StableDiffusionPipeline"):
        TextToImage(pipe, "here")
    pipe.vae = AutoencoderTiny(latent_channels=4)
    with pytest.raises(OptionError, match=r"VAE of here is an AutoencoderTiny.*expected an AutoencoderKL"):
        TextToImage(pipe, "here")
    pipe.vae = AsymmetricAutoencoderKL(norm_num_groups=4)  # without latents_mean in its config
    assert TextToImage(pipe, "here").latents(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 16, 16)


def test_a_run_that_an_older_version_began_knows_its_teacher(bases):
    teacher = open_text_to_image(bases / "sd")
    setup = SimpleNamespace(teacher=teacher, digest="2:0")
    Setup.check_config(setup, {"base": {"digest": teacher.digest(like="")}})
    with pytest.raises(RunError, match="not the pipeline"):
        Setup.check_config(setup, {"base": {"digest": "0" * 64}})


def test_another_teacher_is_not_gone_on_with(whole, bases, tmp_path):
    other = lively(tiny_sd(scheduler=ddim(prediction_type="v_prediction")))
    with torch.no_grad():
        other.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    other.save_pretrained(tmp_path / "sd")
    with pytest.raises(RunError, match="not the pipeline"):
        resume_distillation(whole, {"base": str(tmp_path / "sd")})
    with pytest.raises(OptionError, match=r"form.*pure.*qkv"):
        resume_distillation(whole, {"form": "qkv"})
    with pytest.raises(OptionError, match=r"sample_steps: .* 2000 steps"):
        resume_distillation(whole, {"sample_steps": 2000})


def test_the_size_is_the_base_s(bases, photos):
    setup = Setup.of(photos, DistillOptions(base=str(bases / "sd")))
    assert setup.options.size == (16, 16) and setup.options.lr == 1e-4 and setup.options.precision == "bf16"
    assert setup.teacher.unet.dtype == torch.bfloat16 and setup.teacher.vae.dtype == torch.float32
    assert setup.model(torch.device("cpu")).swap.sample_size is None
    assert Setup.of(photos, DistillOptions(base=str(bases / "sd"), size=24)).options.size == (24, 24)
    setup = Setup.of(photos, DistillOptions(base=str(bases / "sd"), size=(32, 16)))
    swapped = setup.model(torch.device("cpu")).swap
    assert swapped.sample_size == (32 // setup.teacher.pipe.vae_scale_factor, 16 // setup.teacher.pipe.vae_scale_factor)
    pipe = tiny_sd(sample_size=None)
    with pytest.raises(OptionError, match="sample_size"):
        TextToImage(pipe, "here").native_size()


def test_the_command(bases, photos, tmp_path):
    run = CliRunner().invoke
    base, more = str(bases / "sd"), ["--batch-size", "4", "--sample-every", "0", "--workers", "0"]
    result = run(app, ["distill", base, *more])
    assert result.exit_code == 2 and "'--data'" in result.output
    result = run(app, ["distill", "--data", str(photos), *more])
    assert result.exit_code == 2 and "'BASE'" in result.output
    arguments = ["--data", str(photos), "--epochs", "1", "--segment", "2", "--out", str(tmp_path / "run"), *more]
    keeping = ["--keep-attention", "2", "--fit", "1", "--fit-maps", "2"]
    result = run(app, ["distill", base, *arguments, *keeping])
    assert result.exit_code == 0 and "validation: noise" in result.output, result.output
    assert "gspn_swap.safetensors" in result.output and "gspn.load_swap(" in result.output
    loaded = gspn.load_swap(tiny_sd(), tmp_path / "run")
    assert loaded.segment == 2 and len(loaded.kept) == 2
    result = run(app, ["distill", base, *arguments])
    assert result.exit_code == 2 and "not empty" in result.output
    result = run(app, ["distill", "--resume", str(tmp_path / "run"), "--out", "x"])
    assert result.exit_code == 2 and "--out" in result.output
    result = run(app, ["distill", base, "--data", str(photos), "--form", "x"])
    assert result.exit_code == 2 and "form" in result.output and "'x'" in result.output
