"""The task of a distillation: what its loss is, who learns, and what does not count."""

import numpy as np
import pytest
import torch
from helpers.stable_diffusion import WORDS, ddim, tiny_sd, tiny_sdxl

import gspn
from gspn.data.images import UNREADABLE, Preprocessing, Split, decode
from gspn.data.labelled import DataError
from gspn.data.unreadable import Unreadable
from gspn.options.distill import PRESET, DistillOptions
from gspn.tasks.student import PARTS, Distillation, Student
from gspn.tasks.text_to_image import TextToImage
from gspn.train.loop import make_accelerator
from gspn.train.optim import make_optimizer

SIZE = (16, 16)
PREPROCESSING = Preprocessing(3, SIZE, (0.5,) * 3, (0.5,) * 3)


def task_of(pipe, *, captions=None, swapped=None, **more):
    """(task, student) of a pipeline."""
    captions = captions or [(f"{word} fox",) for word in WORDS]
    teacher = TextToImage(pipe, "here", cache=more.pop("cache", False))
    student = Student(teacher, gspn.swap(pipe, **swapped or dict(init="random")))
    weights = dict(noise=1.0, output=0.5, feature=0.5) | more.pop("weights", {})
    unreadable = Unreadable({"train": Split([0] * len(captions), None, read=decode)}, more.pop("strict", False))
    more |= dict(weights=weights, unreadable=unreadable)
    return Distillation(student, captions, captions, PREPROCESSING, None, **more), student


def batch_of(count=4):
    torch.manual_seed(3)
    image = torch.randint(256, (count, 3, *SIZE), dtype=torch.uint8)
    return {"image": image, "label": torch.zeros(count).long(), "index": torch.arange(count)}


# -- the loss --


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_what_is_said(prediction):
    pipe = tiny_sd(scheduler=ddim(prediction_type=prediction))
    task, student = task_of(pipe, dropout=0.0)
    batch = task.prepare(batch_of())
    noisy = pipe.scheduler.add_noise(batch["start"], batch["noise"], batch["timestep"])
    target = {
        "epsilon": batch["noise"],
        "v_prediction": pipe.scheduler.get_velocity(batch["start"], batch["noise"], batch["timestep"]),
        "sample": batch["start"],
    }[prediction]
    text = pipe.encode_prompt([f"{word} fox" for word in WORDS[:4]], "cpu", 1, False)[0]
    torch.testing.assert_close(batch["text"], text)

    def run(modules):
        seen, hooks = [], []
        for module in modules:
            hooks.append(module.register_forward_hook(lambda module, args, output: seen.append(output)))
        output = pipe.unet(noisy, batch["timestep"], text).sample
        for hook in hooks:
            hook.remove()
        return output, seen

    output, features = run(student.swap.layers.values())
    with student.swap.use("attention"):
        taught, wanted = run(student.swap.attentions.values())
    assert len(features) == len(wanted) == 7
    mse = torch.nn.functional.mse_loss
    expected = dict(noise=mse(output, target), output=mse(output, taught), teacher=mse(taught, target))
    expected["feature"] = torch.stack([mse(a, b) for a, b in zip(features, wanted, strict=True)]).mean()
    losses = task.losses(student, batch)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].mean(), value, msg=name)
    loss = task.loss(student, batch) / task.count(batch)
    torch.testing.assert_close(loss, expected["noise"] + 0.5 * expected["output"] + 0.5 * expected["feature"])
    assert all(expected[name] > 1e-6 for name in PARTS)


@pytest.mark.parametrize("away", [0.0, 0.25])
def test_away_from_its_size_the_teacher_counts_less(away, monkeypatch):
    task, student = task_of(tiny_sdxl(), away=away, dropout=0.0)
    taught, teach, sizes = [], Student.teach, []
    monkeypatch.setattr(Student, "teach", lambda *inputs: taught.append(1) or teach(*inputs))
    conditions = TextToImage.conditions
    monkeypatch.setattr(
        TextToImage, "conditions", lambda self, c, size: sizes.append(size) or conditions(self, c, size)
    )
    for size, trust in ((SIZE, 1.0), ((24, 16), away)):
        taught.clear()
        task.sizes = lambda images, size=size: torch.nn.functional.interpolate(images, size)
        batch = task.prepare(batch_of())
        assert batch["start"].shape[2:] == (size[0] // 2, size[1] // 2) and sizes[-1] == size  # which SDXL is told
        losses = task.losses(student, batch)
        assert len(taught) == (trust > 0) and set(losses) >= ({*PARTS} if trust else {"noise"})
        parts = {name: loss.sum() for name, loss in losses.items()}
        expected = parts["noise"]
        if trust:
            expected = expected + trust * 0.5 * (parts["output"] + parts["feature"])
        torch.testing.assert_close(task.loss(student, batch), expected)


def test_a_teacher_whose_word_has_no_weight_runs_in_validation_only(monkeypatch):
    task, student = task_of(tiny_sd(), weights=dict(output=0.0, feature=0.0), dropout=0.0)
    task.unreadable.splits["evaluation"], task.loader = task.unreadable.splits["train"], [batch_of()]
    taught, teach = [], Student.teach
    monkeypatch.setattr(Student, "teach", lambda *inputs: taught.append(1) or teach(*inputs))
    batch = task.prepare(batch_of())
    loss = task.loss(student, batch)
    assert not taught
    noisy, timestep, conditions = task.inputs(batch)
    output, _ = student(noisy, timestep, conditions)
    torch.testing.assert_close(loss / 4, torch.nn.functional.mse_loss(output, batch["noise"]))
    row = task.evaluate(student, make_accelerator())
    assert taught and min(row[f"val_{name}"] for name in (*PARTS, "teacher")) > 0


@pytest.mark.parametrize("form", ["pure", "qkv"])
def test_no_bias_has_weight_decay(form):
    """Those of the gates are not 1-D, as the others are."""
    _, student = task_of(tiny_sd(), swapped=dict(form=form))
    groups = make_optimizer(student, DistillOptions().resolved(PRESET)).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    decays = {name: decays[id(parameter)] for name, parameter in student.named_parameters()}
    biases = {name for name in decays if name.endswith("bias")}
    assert any(name.endswith("weight_bias") for name in biases) == (form == "qkv")
    assert {decays[name] for name in biases} == {0.0}
    assert {decays[name] for name in decays if name.endswith(("proj", ".weight"))} == {PRESET["weight_decay"]}


def test_the_teacher_is_the_pipeline_itself():
    """Before a swap, during and after, to the last bit; and the loss against it is 0 for a student that is it."""
    pipe = tiny_sdxl()
    teacher = TextToImage(pipe, "here")
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), teacher.conditions(["red fox", None], SIZE)
    before, weights = teacher.predict(*inputs), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    digest = teacher.digest()
    task, student = task_of(pipe)
    student.train()
    assert torch.equal(student.teach(*inputs)[0], before) and not torch.equal(student(*inputs)[0], before)
    optimizer = torch.optim.SGD([p for p in pipe.unet.parameters() if p.requires_grad], lr=1.0)
    task.loss(student, task.prepare(batch_of())).backward()
    optimizer.step()
    assert torch.equal(student.teach(*inputs)[0], before)
    student.forward = student.teach
    losses = task.losses(student, task.prepare(batch_of()))
    assert (
        not losses["output"].any() and not losses["feature"].any() and torch.equal(losses["noise"], losses["teacher"])
    )
    gspn.restore(pipe)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items()) and teacher.digest() == digest


@pytest.mark.parametrize("form", ["pure", "qkv"])
def test_only_the_swapped_layers_learn(form):
    """All of them, whatever runs twice to keep fewer activations."""
    gradients = []
    for checkpointing in (False, True):
        pipe = tiny_sd()
        torch.manual_seed(0)
        task, student = task_of(pipe, swapped=dict(form=form, segment=2, init="random"), dropout=0.0)
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        torch.manual_seed(0)
        task.loss(student, task.prepare(batch_of())).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
        with_gradient = {name for name, p in pipe.unet.named_parameters() if p.grad is not None}
        layers = student.swap.layers.items()
        assert with_gradient == {f"{n}.{m}" for n, layer in layers for m, _ in layer.named_parameters()}
        assert all(g is not None and g.any() for g in gradients[-1].values())
        assert not any(p.grad is not None for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_unreadable_images_do_not_count():
    task, student = task_of(tiny_sd())
    batch = batch_of()
    batch["label"][1] = UNREADABLE
    prepared = task.prepare(batch)
    losses = task.losses(student, prepared)
    assert task.count(prepared) == 3
    assert all((loss != 0).tolist() == [True, False, True, True] for loss in losses.values())
    task.unreadable.strict = True
    with pytest.raises(DataError, match=r"\(--strict\): image 1: "):
        task.prepare(batch)
    task.unreadable.strict, batch["label"][:] = False, UNREADABLE
    task.unreadable.splits["evaluation"], task.loader = task.unreadable.splits["train"], [batch]
    with pytest.raises(DataError, match="none of the 4 images"):
        task.evaluate(student, make_accelerator())


def test_layers_whose_loss_is_no_number_are_not_kept():
    saved = []
    task, student = task_of(tiny_sd(), save=lambda: saved.append(1), dropout=0.0)
    task.unreadable.splits["evaluation"], task.loader = task.unreadable.splits["train"], [batch_of()]
    layer = next(iter(student.swap.layers.values()))
    bias = layer.to_out[0].bias.detach().clone()
    layer.to_out[0].bias.data.fill_(float("nan"))
    assert not np.isfinite(task.evaluate(student, make_accelerator())["val_loss"]) and not saved and task.best is None
    layer.to_out[0].bias.data.copy_(bias)
    assert task.evaluate(student, make_accelerator())["val_loss"] == task.best and saved


def test_captions_are_drawn_and_dropped(monkeypatch):
    task, _ = task_of(tiny_sd(), captions=[("red", "green"), ("blue",)], dropout=0.3)
    seen, conditions = [], TextToImage.conditions
    monkeypatch.setattr(
        TextToImage, "conditions", lambda self, c, size: seen.extend(c) or conditions(self, c[:1], size)
    )
    monkeypatch.setattr(TextToImage, "latents", lambda self, images, draw: torch.zeros(len(images), 4, 8, 8))
    batch = {"image": torch.zeros(3000, 3, 1, 1), "label": torch.zeros(3000), "index": torch.arange(3000) % 2}
    task.prepare(batch)
    first, second = seen[::2], seen[1::2]
    assert set(first) == {"red", "green", None} and set(second) == {"blue", None}
    assert 0.26 < seen.count(None) / 3000 < 0.34 and 0.8 < first.count("red") / first.count("green") < 1.25


# -- runs --
