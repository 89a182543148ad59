"""Checks of schedulers before any work: those that cannot sample, and numbers of steps that give NaN."""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from helpers.diffusion import tiny_generator

from gspn.models.pipeline import GSPNPipeline
from gspn.models.schedulers import check_sampler, check_schedule, check_steps

TO_NOISE = dict(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMInverseScheduler", dict(rescale_betas_zero_snr=False)),
        ("DPMSolverMultistepInverseScheduler", {}),
        ("UnCLIPScheduler", {}),
        ("CogVideoXDPMScheduler", dict(rescale_betas_zero_snr=False)),
        ("DPMSolverMultistepScheduler", dict(use_flow_sigmas=True)),
        ("DPMSolverSinglestepScheduler", dict(use_flow_sigmas=True)),
        ("UniPCMultistepScheduler", dict(use_flow_sigmas=True)),
        ("DEISMultistepScheduler", dict(use_flow_sigmas=True)),
        ("SASolverScheduler", dict(use_flow_sigmas=True)),
        ("EulerDiscreteScheduler", dict(timestep_type="continuous", prediction_type="v_prediction")),
    ],
)
def test_schedulers_that_cannot_sample_are_refused_before_any_work(name, config, monkeypatch):
    scheduler = getattr(diffusers, name)(**config)
    model = tiny_generator(prediction_type=scheduler.config.prediction_type)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=f"^{name} (does not make images|has (use_flow_sigmas|timestep_type)=)"):
        GSPNPipeline(model, scheduler)([0], num_inference_steps=4)


def test_one_that_wants_more_for_a_step_is_refused_whatever_the_prediction(monkeypatch):
    class Mine(DDIMScheduler):
        def step(self, model_output, timestep, sample, before, return_dict=True):
            pytest.fail("a step was made")

    model = tiny_generator()
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=r"Mine cannot make 4 steps.*'epsilon'.*\(.*'before'\)"):
        GSPNPipeline(model, Mine())([0], num_inference_steps=4)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (DPMSolverMultistepScheduler(20), 20, "NaN in 20 steps of 20 timesteps: .*trailing"),
        (DEISMultistepScheduler(20), 20, "NaN in 20 steps of 20 timesteps"),
        (EulerAncestralDiscreteScheduler(beta_schedule="squaredcos_cap_v2"), 4, "NaN in 4 steps of 1000"),
        (LCMScheduler(), 60, "LCMScheduler cannot make 60 steps.*original_steps"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_steps_that_give_nan_are_refused_before_any_work(scheduler, steps, message, monkeypatch):
    model = tiny_generator()
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        GSPNPipeline(model, scheduler).check_inputs([0], num_inference_steps=steps)
    GSPNPipeline(model, scheduler).check_inputs([0], num_inference_steps=steps - 1 if steps != 60 else 50)


def test_steps_that_repeat_by_design_are_allowed():
    state = torch.get_rng_state()
    for scheduler in (HeunDiscreteScheduler(20), EulerDiscreteScheduler(20), DDPMScheduler(20)):
        check_steps(scheduler, 20)
        check_sampler(scheduler)
    karras = DPMSolverMultistepScheduler(1000, use_karras_sigmas=True)  # rounds several noises to one timestep
    check_steps(karras, 200)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
def test_a_number_close_to_zero_for_the_last_signal_is_no_better(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}.* 'epsilon'.*rescale_betas_zero_snr=False"):
        check_schedule(kind(**TO_NOISE))
    check_schedule(kind(prediction_type="v_prediction", **TO_NOISE))
    check_schedule(kind(beta_schedule="scaled_linear"))
