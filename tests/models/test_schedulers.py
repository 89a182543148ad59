"""Checks of schedulers before any work: those that cannot sample, and numbers of steps that give NaN. Shifted ones."""

import diffusers
import numpy as np
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
from gspn.models.schedulers import check_sampler, check_schedule, check_steps, set_timesteps

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


# -- shifted timesteps --


@pytest.mark.parametrize("shift", [1.5, 4])
@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_shifted_timesteps_have_so_many_times_as_much_noise(kind, shift):
    plain, shifted = kind(), kind()
    set_timesteps(plain, 10)
    set_timesteps(shifted, 10, shift)
    signal, (own, got) = plain.alphas_cumprod.double().numpy(), (s.timesteps.double().numpy() for s in (plain, shifted))
    noise = ((1 - signal) / signal) ** 0.5
    assert len(got) == 10 and got[0] == own[0] and (np.diff(got) < 0).all()
    assert (got[1:] > own[1:]).all()
    # one factor brings the first one back to where it was: r(t'_0) = s r(u t_0) = r(t_0)
    u = np.interp(noise[int(own[0])] / shift, noise, np.arange(1000)) / own[0]
    middle = slice(2, 8)  # where a timestep rounded to a whole number is as exact as a few per cent of the noise
    expected = shift * np.interp(u * own, np.arange(1000), noise)
    np.testing.assert_allclose(np.interp(got, np.arange(1000), noise)[middle], expected[middle], rtol=0.02)


def test_a_shift_of_a_solver_of_second_order_and_of_a_single_step():
    heun = HeunDiscreteScheduler()
    set_timesteps(heun, 5, 2.0)
    assert heun.timesteps.tolist() == sorted(heun.timesteps.tolist(), reverse=True) and len(heun.timesteps) == 9
    one = DDPMScheduler()
    set_timesteps(one, 1, 2.0)
    assert one.timesteps.tolist() == [0]
    check_steps(HeunDiscreteScheduler(), 5, shift=2.0)


@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_a_shift_where_the_last_timestep_is_pure_noise(kind, beta_schedule, recwarn):
    scheduler = kind(rescale_betas_zero_snr=True, beta_schedule=beta_schedule, timestep_spacing="trailing")
    set_timesteps(scheduler, 8, 2.0)
    timesteps = scheduler.timesteps.tolist()
    assert timesteps[0] == 999 and (np.diff(timesteps) < 0).all() and timesteps[1] > 999 * 7 / 8
    assert not [str(each.message) for each in recwarn if issubclass(each.category, RuntimeWarning)]  # of numpy


def test_a_shift_of_a_scheduler_that_was_used_on_a_gpu():
    """add_noise moves its alphas_cumprod there."""

    class OnGPU(torch.Tensor):
        def numpy(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    scheduler, plain = DDPMScheduler(), DDPMScheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.as_subclass(OnGPU)
    for each in (scheduler, plain):
        set_timesteps(each, 10, 2.0)
    assert scheduler.timesteps.tolist() == plain.timesteps.tolist()


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (
            DDIMScheduler(),
            5,
            "^DDIMScheduler cannot be given timesteps, so timestep_shift has to be 1, got 2.0: .*DDPM",
        ),
        (EulerAncestralDiscreteScheduler(), 5, "EulerAncestralDiscreteScheduler cannot be given timesteps"),
        (DDPMScheduler(), 1000, "timestep_shift=2.0 makes 1000 steps repeat a timestep"),
        (EulerDiscreteScheduler(use_karras_sigmas=True), 5, "^this EulerDisc.* timestep_shift has to be 1.*karras"),
    ],
)
def test_what_cannot_be_shifted_is_refused_before_any_work(scheduler, steps, message, monkeypatch):
    model = tiny_generator()
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        GSPNPipeline(model, scheduler)([0], num_inference_steps=steps, timestep_shift=2.0)
