# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Classes: in the networks, in the chain of the calibrator, and as `class_labels` of the pipelines."""

import numpy as np
import PIL.Image
import pytest
import torch

from ecvae_diffusers import (
    AutoencoderEC,
    ECVAEPipeline,
    ECVAERestorationPipeline,
    EnergyCalibrator,
    EnergyModel,
    LangevinScheduler,
)
from ecvae_diffusers.cli import main
from ecvae_diffusers.energy import compute_energy
from ecvae_diffusers.operators import SuperResolution


NAMES = ["shirt", "shoe", "bag"]
UNKNOWN = len(NAMES)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def by_class() -> ECVAEPipeline:
    """A pipeline of three classes, the second of which the training data did not have."""
    torch.manual_seed(0)
    config = {"sample_size": 16, "in_channels": 1, "block_out_channels": (8, 8), "num_class_embeds": UNKNOWN}
    vae = AutoencoderEC(
        latent_channels=4, id2label={str(i): name for i, name in enumerate(NAMES)}, class_frequencies=[0.25, 0, 0.75],
        reconstruction_variance=0.01, **config,
    )  # fmt: skip
    for name, parameter in vae.named_parameters():
        if "embedding" in name:  # 0 at first, so that classes do not differ
            parameter.data.normal_(0, 0.5)
    pipeline = ECVAEPipeline(vae.eval(), EnergyModel(**config).eval(), LangevinScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipe: ECVAEPipeline, class_labels, **kwargs) -> torch.Tensor:
    kwargs = {"latents": randn(4, 4, 1, 1), "output_type": "pt", **kwargs}
    return pipe(class_labels=class_labels, **kwargs).images


def test_each_image_is_of_its_class_and_of_no_neighbour(by_class):
    """In the decoder, the encoder, the energy model and sliced decoding: a batch of classes is the images of each."""
    vae, labels, images = by_class.vae, torch.tensor([0, 2, UNKNOWN, 1]), randn(4, 1, 16, 16).tanh()
    for call, given in (
        (lambda x, c: vae.decode(x, class_labels=c).sample, randn(4, 4, 1, 1)),
        (lambda x, c: vae.encode(x, class_labels=c).latent_dist.parameters, images),
        (lambda x, c: by_class.energy_model(x, c).energy, images),
    ):
        with torch.no_grad():
            whole = call(given, labels)
            each = torch.cat([call(given[i : i + 1], labels[i : i + 1]) for i in range(4)])
            torch.testing.assert_close(whole, each)
            vae.enable_slicing()
            torch.testing.assert_close(call(given, labels), whole)
            vae.disable_slicing()
            same = given[:1].expand_as(given)
            assert len(call(same, labels).view(4, -1).unique(dim=0)) == 4
            torch.testing.assert_close(call(given, None), call(given, torch.full((4,), UNKNOWN)))


def test_a_new_decoder_draws_every_class_alike():
    """Embeddings begin at 0: learning classes begins from what all have in common."""
    vae = AutoencoderEC(
        sample_size=16, in_channels=1, latent_channels=4, block_out_channels=(8, 8), num_class_embeds=2
    )
    z = randn(1, 4, 1, 1).expand(3, -1, -1, -1)
    images = vae.decode(z, class_labels=torch.arange(3)).sample
    torch.testing.assert_close(images, images[:1].expand_as(images))


def test_the_energy_is_a_projection(by_class):
    """f(x, c) - f(x, c') is the same linear function of the mean features for every x: the energies of classes are of rank 4."""
    model, images = by_class.energy_model, randn(12, 1, 16, 16).tanh()
    with torch.no_grad():
        energies = torch.stack([model(images, torch.full((12,), c)).energy for c in range(UNKNOWN + 1)], dim=1)
        features = []
        hook = model.networks[0].act_out.register_forward_hook(lambda *args: features.append(args[2].mean((2, 3))))
        model(images)
        hook.remove()
        weight = model.networks[0].class_out.weight.flatten(1)
    differences = energies[:, 1:] - energies[:, :1]
    torch.testing.assert_close(differences, features[0] @ (weight[1:] - weight[:1]).mT, atol=1e-5, rtol=1e-4)


def test_the_chain_follows_the_energy_of_each_sample_s_class():
    """f(x, c) = |x - m_c|^2 / 2: a step of a moves a sample by the share a towards the mean of its own class."""
    means, labels, samples = randn(3, 9, seed=1), torch.tensor([0, 2, 1, 2]), randn(4, 9)

    def energy(x, c):
        return (x - means[c]).square().sum(1) / 2

    calibrator = EnergyCalibrator(energy, LangevinScheduler(1, drift_step_size=0.25, noise_scale=0.0), tolerance=1.0)
    output = calibrator.calibrate(samples, condition=labels)
    torch.testing.assert_close(output.targets, samples + 0.25 * (means[labels] - samples))
    torch.testing.assert_close(output.energy_samples, energy(samples, labels))
    for gamma in (0.0, 0.5):
        calibrator.gradient_penalty = gamma
        found = calibrator.energy_loss(samples, output.targets, condition=labels, target_condition=labels.flip(0))
        torch.testing.assert_close(found.energy_real, energy(samples, labels))
        torch.testing.assert_close(found.energy_targets, energy(output.targets, labels.flip(0)))
    with pytest.raises(ValueError, match="`target_condition`"):
        calibrator.energy_loss(samples, output.targets, condition=labels)


def test_generates_by_name_and_number(by_class):
    images = sample(by_class, ["bag", 0, "shirt", UNKNOWN])
    torch.testing.assert_close(images, sample(by_class, torch.tensor([2, 0, 0, UNKNOWN])))
    torch.testing.assert_close(sample(by_class, "bag"), sample(by_class, [2, 2, 2, 2]))
    assert by_class.get_label_ids("shoe") == [1] and by_class.get_label_ids(["bag", "shirt"]) == [2, 0]
    assert len(by_class(class_labels=["bag", "shoe", None]).images) == 3


def test_without_a_label_classes_have_their_frequencies(by_class, monkeypatch):
    drawn = []
    monkeypatch.setattr(by_class, "decode", lambda z, labels: drawn.append(labels) or torch.zeros(len(z), 1, 16, 16))
    for _ in range(2):
        by_class(batch_size=2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0].bincount(minlength=3)[1] == 0 and abs((drawn[0] == 0).float().mean() - 0.25) < 0.04
    by_class(generator=[torch.Generator().manual_seed(i) for i in range(3)], class_labels=[None, "shoe", None])
    by_class(generator=torch.Generator().manual_seed(2), class_labels=[None])
    assert drawn[2][1] == 1 and drawn[2][2] == drawn[3][0]


def test_reconstruction_interpolation_score_and_restoration_take_classes(by_class):
    images = sample(by_class, [0, 1, 2, UNKNOWN])
    labels = ["shirt", 1, "bag", None]
    found = by_class.reconstruct(images, output_type="pt", class_labels=labels).images
    given = torch.tensor([0, 1, 2, UNKNOWN])
    with torch.no_grad():
        z = by_class.vae.encode(images * 2 - 1, class_labels=given).latent_dist.mode()
        expected = by_class.vae.decode(z, class_labels=given).sample / 2 + 0.5
        energy = compute_energy(by_class.energy_model, images * 2 - 1, given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_class.score(images, class_labels=labels), energy)
    refined = [
        by_class.reconstruct(images, num_refinement_steps=2, output_type="pt", class_labels=c).images for c in (0, 2)
    ]
    assert not torch.equal(*refined)
    path = by_class.interpolate(images, images.flip(0), num_steps=3, output_type="pt", class_labels=labels).images
    torch.testing.assert_close(path[::3], found)
    pipe = ECVAERestorationPipeline.from_pipe(by_class)
    pipe.set_progress_bar_config(disable=True)
    operator = SuperResolution(2)
    y = operator.A(images[:2] * 2 - 1)
    outputs = []
    for some in (None, [UNKNOWN, UNKNOWN], ["shirt", "bag"]):
        outputs.append(
            pipe(
                y, operator, num_restorations=2, num_inference_steps=4, energy_weight=0.1, output_type="pt", class_labels=some,
                generator=torch.Generator().manual_seed(0),
            )
        )  # fmt: skip
    torch.testing.assert_close(outputs[0].images, outputs[1].images)
    assert not torch.equal(outputs[1].images, outputs[2].images)
    assert outputs[2].residual.max() < 1e-5


def test_wrong_labels_are_refused(by_class, pipe):
    images = torch.zeros(2, 1, 16, 16)
    for wrong in ("trousers", -1, UNKNOWN + 1, 0.5, True, ["bag"] * 3, [["bag"]] * 4):
        with pytest.raises(ValueError, match="`class_labels`"):
            sample(by_class, wrong)
    for call in (
        lambda: pipe(class_labels=[0]),
        lambda: pipe.get_label_ids("bag"),
        lambda: by_class.reconstruct(images, class_labels=["bag"]),
        lambda: by_class.score(images, class_labels=["bag"]),
        lambda: pipe.vae.decode(randn(2, 8, 1, 1), class_labels=torch.tensor([0, 0])),
        lambda: by_class.vae.decode(randn(2, 4, 1, 1), class_labels=torch.tensor([0])),
        lambda: by_class.vae.decode(randn(2, 4, 1, 1), class_labels=torch.tensor([0.0, 1.0])),
        lambda: by_class.energy_model(images, torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match="`class_labels`"):
            call()
    for name, value in (("num_class_embeds", 0), ("id2label", {"1": "bag"}), ("class_frequencies", [0.5])):
        with pytest.raises(ValueError, match=f"`{name}`"):
            AutoencoderEC(sample_size=16, block_out_channels=(8, 8), **{"num_class_embeds": 2, name: value})


def test_the_command_line_asks_for_classes(by_class, tmp_path):
    """`ecvae sample` takes them in turn or draws them by the seed, whatever the batch size. `ecvae restore` takes one."""
    by_class.save_pretrained(tmp_path / "model")

    def call(command, name, *arguments) -> list[np.ndarray]:
        main([command, *map(str, arguments), "--device", "cpu", "-o", str(tmp_path / name)])
        return [np.array(PIL.Image.open(path)) for path in sorted((tmp_path / name).glob("*.png"))]

    def same(some, others) -> bool:
        return all((one == other).all() for one, other in zip(some, others, strict=True))

    model = tmp_path / "model"
    in_turn = call("sample", "turn", model, "-n", 4, "--class_labels", "bag", 0)
    of_bags = call("sample", "bags", model, "-n", 4, "--class_labels", "bag")
    assert same(in_turn[::2], of_bags[::2]) and not same(in_turn[1::2], of_bags[1::2])
    drawn = [call("sample", f"drawn{size}", model, "-n", 4, "--batch_size", size) for size in (1, 4)]
    assert same(*drawn)
    picture, task = (
        tmp_path / "turn" / "0.png",
        ["--model", model, "--task", "super_resolution_x2", "--num_inference_steps", 2],
    )
    restored = [
        call("restore", f"as{c}", picture, *task, *extra) for c, extra in ((0, ["--class_label", "bag"]), (1, []))
    ]
    assert not same(*restored)
    for command, arguments in (("sample", [model, "--class_labels"]), ("restore", [picture, *task, "--class_label"])):
        with pytest.raises(SystemExit, match="`class_labels`"):
            call(command, f"refused_{command}", *arguments, "trousers")


def test_saved_classes_load_with_their_names(by_class, tmp_path):
    by_class.save_pretrained(tmp_path)
    loaded = ECVAEPipeline.from_pretrained(tmp_path)
    assert loaded.get_label_ids("bag") == [2]
    torch.testing.assert_close(sample(loaded, ["bag", 1, 0, UNKNOWN]), sample(by_class, ["bag", 1, 0, UNKNOWN]))
