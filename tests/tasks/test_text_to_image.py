"""The teacher of a distillation: conditions of its UNet, captions that are too long, what makes another one."""

import json
import logging
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.stable_diffusion import ddim, tiny_sd, tiny_sdxl

from gspn.digests import is_earlier
from gspn.options.distill import DistillOptions
from gspn.stable_diffusion.highres.images import encode
from gspn.tasks.side_by_side import SideBySide
from gspn.tasks.text_to_image import WARN_OF_LENGTHS, TextToImage, open_text_to_image

SIZE = (16, 16)


@pytest.mark.parametrize("kind", ["sd", "xl", "xl, empty text"])
def test_conditions_are_those_of_the_pipeline(kind):
    """What the pipeline gives its UNet for a caption, and for the unconditional half of guidance."""
    pipe = tiny_sd() if kind == "sd" else tiny_sdxl()
    if kind == "xl, empty text":
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    seen, forward = {}, pipe.unet.forward

    def spy(sample, timestep, encoder_hidden_states, added_cond_kwargs=None, **more):
        seen.update(text=encoder_hidden_states, **(added_cond_kwargs or {}))
        return forward(sample, timestep, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs, **more)

    pipe.unet.forward = spy
    pipe(["red fox", "a owl"], height=16, width=32, num_inference_steps=1, output_type="latent")
    for cache in (False, True):
        ours = TextToImage(pipe, "here", cache=cache).conditions([None, None, "red fox", "a owl"], (16, 32))
        torch.testing.assert_close(ours["text"], seen["text"])
        assert not torch.equal(ours["text"][0], ours["text"][2])
        if kind != "sd":
            torch.testing.assert_close(ours["pooled"], seen["text_embeds"])
            torch.testing.assert_close(ours["ids"], seen["time_ids"])


def test_a_cache_depends_on_no_batch():
    teacher = TextToImage(tiny_sd(), "here")
    images, captions = torch.rand(5, 3, 16, 16) * 2 - 1, ["red", "red fox", None, "a owl", "red"]
    latents, text = teacher.latents(images, draw=False), teacher.conditions(captions, SIZE)["text"]
    teacher.cache = {}
    again = [teacher.latents(images[[i]], draw=False) for i in range(5)]
    alone = [teacher.conditions([caption], SIZE)["text"] for caption in captions]
    with torch.autocast("cpu", torch.bfloat16):
        teacher.cache.clear()
        together = teacher.latents(images, draw=False), teacher.conditions(captions, SIZE)["text"]
    assert torch.equal(torch.cat(again), together[0]) and torch.equal(torch.cat(alone), together[1])
    torch.testing.assert_close(together[0], latents)
    torch.testing.assert_close(together[1], text)
    assert len(teacher.cache) == 5 + 4
    drawn = teacher.latents(images[:1].repeat(1000, 1, 1, 1))
    with torch.no_grad():
        posterior = teacher.vae.encode(images[:1]).latent_dist
    torch.testing.assert_close(drawn.mean(0), posterior.mean[0] * 0.5, atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.std(0), posterior.std[0] * 0.5, atol=0.02, rtol=0.1)


def test_draws_do_not_depend_on_the_layout_of_the_vae():
    teacher, images = TextToImage(tiny_sd(), "here"), torch.rand(2, 3, 16, 16) * 2 - 1
    drawn = []
    for layout in (torch.contiguous_format, torch.channels_last):
        teacher.vae.to(memory_format=layout)
        torch.manual_seed(0)
        drawn.append(teacher.latents(images.contiguous(memory_format=layout)))
    torch.testing.assert_close(*drawn)
    assert len({each.stride() for each in drawn}) == 1


def test_latents_are_scaled_as_the_pipeline_does_it():
    """It does not apply a VAE's shift_factor."""
    teacher = TextToImage(tiny_sd(vae=dict(shift_factor=0.35)), "here")
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = teacher.vae.encode(image).latent_dist.mean
    torch.testing.assert_close(teacher.latents(image, draw=False), mean * 0.5)
    torch.testing.assert_close(encode(teacher.pipe, image), mean * 0.5)


def test_long_captions_are_told():
    teacher = TextToImage(tiny_sd(), "here")
    assert teacher.too_long([("red fox",), ("a owl",)]) is None
    note = teacher.too_long([("red fox",), ("red fox of a house with a smile",)])
    assert re.search("1 of .*2 captions.* 8 tokens", note)


def test_long_captions_are_told_by_us_alone(tmp_path):
    """diffusers and transformers would warn of each of them, in each batch and in each picture."""
    long, told, handler = "red fox of a house with a smile", [], logging.Handler()
    handler.emit = lambda record: told.append(record.name)
    for name in WARN_OF_LENGTHS:
        logging.getLogger(name).addHandler(handler)
    try:
        teacher = TextToImage(tiny_sd(), "here")
        student = SimpleNamespace(teacher=teacher, swap=SimpleNamespace(use=lambda which: nullcontext()))
        options = DistillOptions(size=SIZE, epochs=1, sample_steps=2, sample_every=1)
        with torch.no_grad():
            teacher.conditions([long], SIZE)
            assert SideBySide(student, [(long,)], options, tmp_path)(1) is not None and told == []
            tiny_sd().encode_prompt(long, "cpu", 1, True)
        assert {name.partition(".")[0] for name in told} == {"diffusers", "transformers"}
    finally:
        for name in WARN_OF_LENGTHS:
            logging.getLogger(name).removeHandler(handler)


def test_what_makes_another_teacher(tmp_path):
    """Noise and weights; not what sampling is set to, nor which diffusers saved it."""
    path = tmp_path / "sd"
    tiny_sd(scheduler=ddim(prediction_type="v_prediction")).save_pretrained(path)
    config, digests = json.loads((path / "scheduler/scheduler_config.json").read_text()), []
    changes = ({}, {"_diffusers_version": "0.30.0", "timestep_spacing": "trailing"}, {"trained_betas": [0.1, 0.2]})
    for change in (*changes, {"beta_end": 0.02}, {"prediction_type": "epsilon"}, {"rescale_betas_zero_snr": True}):
        (path / "scheduler/scheduler_config.json").write_text(json.dumps(config | change))
        digests.append(open_text_to_image(path).digest())
    assert digests[0] == digests[1] and len(set(digests[1:])) == 5


def test_the_precision_does_not_depend_on_the_version_of_diffusers(tmp_path, monkeypatch):
    """An older one does not know `dtype`, and loads all in float32."""
    tiny_sd().save_pretrained(tmp_path)
    load = StableDiffusionPipeline.from_pretrained
    for older in (False, True):
        if older:
            monkeypatch.setattr(
                StableDiffusionPipeline, "from_pretrained", lambda *args, dtype, **more: load(*args, **more)
            )
        teacher = open_text_to_image(tmp_path, precision="bf16")
        assert teacher.unet.dtype == teacher.pipe.text_encoder.dtype == torch.bfloat16
        assert teacher.vae.dtype == torch.float32
        assert open_text_to_image(tmp_path).unet.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_opening_a_pipeline_makes_diffusers_warn_of_nothing(tmp_path, precision):
    """It would of each cast, be it one that changes nothing."""
    tiny_sd().save_pretrained(tmp_path)
    told, handler, logger = [], logging.Handler(logging.WARNING), logging.getLogger("diffusers")
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    try:
        open_text_to_image(tmp_path, precision=precision)
        assert told == []
    finally:
        logger.removeHandler(handler)


def test_settings_and_words_make_another_teacher():
    """Which weights do not tell."""
    pipe = tiny_sd()
    before = TextToImage(pipe, "here").digest()
    assert TextToImage(tiny_sd(), "elsewhere").digest() == before
    found = [before]
    for part, change in (("vae", {"scaling_factor": 0.25}), ("unet", {"norm_eps": 1e-3}), ("unet", {"act_fn": "gelu"})):
        other = tiny_sd()
        getattr(other, part).register_to_config(**change)
        found.append(TextToImage(other, "here").digest())
    other = tiny_sd()
    other.text_encoder.config.hidden_act = "gelu_new"
    found.append(TextToImage(other, "here").digest())
    other = tiny_sd()
    other.tokenizer.model_max_length -= 1
    found.append(TextToImage(other, "here").digest())
    assert len(set(found)) == 6 and not any(map(is_earlier, found))
