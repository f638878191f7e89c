# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tests of `AutoencoderEC`, and `ModelTests`: what must hold of every model, after the mixins of diffusers' own tests."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_to_fp32
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from ecvae_diffusers import AutoencoderEC
from ecvae_diffusers.models import AutoencoderECOutput


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unsettle(model: torch.nn.Module, sample: torch.Tensor) -> torch.nn.Module:
    """
    Move every parameter and buffer away from the value that construction gives it, so that a part that is not saved,
    loaded or copied shows.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
        model.train()
        for _ in range(3):
            model(sample)
    return model.eval()


class ModelTests:
    """
    A subclass gives the fixture `model` (evaluation mode, unsettled), and the methods below. It holds no test of one
    model alone, and is not collected by itself.
    """

    def sample(self, batch_size: int = 3) -> torch.Tensor:
        raise NotImplementedError

    def outputs(self, model: torch.nn.Module, sample: torch.Tensor) -> list[torch.Tensor]:
        """All that a forward pass gives, as tensors."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, sample: torch.Tensor, step: int = 0) -> torch.Tensor:
        """What training minimises, with the same random numbers at the same `step`."""
        raise NotImplementedError

    def assert_same_outputs(self, model: torch.nn.Module, other: torch.nn.Module):
        # Copies lie in aligned memory. What safetensors loads does not, and there a dot product (spectral norm takes
        # one) may be summed in another order: the last bit would differ without any bit of the state doing so.
        model, other = copy.deepcopy(model), copy.deepcopy(other)
        with torch.no_grad():
            for a, b in zip(self.outputs(model, self.sample()), self.outputs(other, self.sample()), strict=True):
                assert torch.equal(a, b)

    def assert_same_state(self, model: torch.nn.Module, other: torch.nn.Module):
        state, other_state = model.state_dict(), other.state_dict()
        assert state.keys() == other_state.keys()
        for name in state:
            assert state[name].dtype == other_state[name].dtype, name
            assert torch.equal(state[name], other_state[name]), name

    # Saving and loading

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_from_save_pretrained(self, model, tmp_path, low_cpu_mem_usage):
        """Bit-equal, the buffers of spectral and batch norm too; with `low_cpu_mem_usage` it is built without memory."""
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not loaded.training
        assert not any(tensor.is_meta for tensor in itertools.chain(loaded.parameters(), loaded.buffers()))
        self.assert_same_state(model, loaded)
        self.assert_same_outputs(model, loaded)

    def test_loaded_model_trains(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).train()
        self.loss(loaded, self.sample()).backward()
        assert all(parameter.grad is not None for parameter in loaded.parameters())

    def test_variant(self, model, tmp_path):
        model.save_pretrained(tmp_path, variant="fp16")
        assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
        self.assert_same_outputs(model, type(model).from_pretrained(tmp_path, variant="fp16"))
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            type(model).from_pretrained(tmp_path)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_loading_dtype(self, model, tmp_path, dtype, low_cpu_mem_usage):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
        assert loaded.dtype == dtype
        for name, tensor in loaded.state_dict().items():
            # Batch normalization counts in integers.
            assert tensor.dtype == (dtype if tensor.is_floating_point() else torch.int64), name
        with torch.no_grad():
            outputs = self.outputs(loaded, self.sample().to(dtype))
            for output, expected in zip(outputs, self.outputs(model, self.sample()), strict=True):
                error = (output.double() - expected.double()).abs().max() / expected.double().abs().max()
                # Rounding to 8 (bfloat16) or 11 (float16) bits, through a few layers; float64 gives float32's own.
                assert error < {torch.float16: 0.01, torch.bfloat16: 0.1, torch.float64: 1e-5}[dtype]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_saving_dtype(self, model, tmp_path, dtype):
        """A checkpoint saved in another precision comes back in it, unrounded."""
        model.to(dtype).save_pretrained(tmp_path)
        self.assert_same_state(model, type(model).from_pretrained(tmp_path, torch_dtype=dtype))

    @pytest.mark.parametrize("variant", [None, "fp16"])
    def test_sharded_checkpoint(self, model, tmp_path, variant):
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        model.save_pretrained(tmp_path, max_shard_size=size // 3, variant=variant)
        infix = "" if variant is None else f".{variant}"
        index = json.loads((tmp_path / f"diffusion_pytorch_model.safetensors.index{infix}.json").read_text())
        assert set(index["weight_map"]) == set(model.state_dict())
        shards = set(index["weight_map"].values())
        assert len(shards) >= 3 and all((tmp_path / shard).is_file() for shard in shards)
        loaded = type(model).from_pretrained(tmp_path, variant=variant)
        self.assert_same_state(model, loaded)
        self.assert_same_outputs(model, loaded)

    def test_config_round_trip(self, model, tmp_path):
        """`from_config` is what EMA and pipelines rebuild a model with: it must lose no argument."""
        rebuilt = type(model).from_config(model.config)
        assert dict(rebuilt.config) == dict(model.config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes
        rebuilt.load_state_dict(model.state_dict())
        self.assert_same_outputs(model, rebuilt.eval())

        model.save_config(tmp_path)
        saved = type(model).load_config(tmp_path)
        assert saved.pop("_class_name") == type(model).__name__
        saved.pop("_diffusers_version")
        # JSON knows no tuples.
        assert saved == json.loads(json.dumps({k: v for k, v in model.config.items() if not k.startswith("_")}))

    # Outputs

    def test_named_blocks_exist(self, model):
        """Compilation by blocks looks for these names, and silently does nothing where there is none."""
        names = {type(module).__name__ for module in model.modules()}
        assert model._repeated_blocks and set(model._repeated_blocks) <= names
        assert set(model._repeated_blocks) <= set(model._no_split_modules)

    def test_determinism(self, model):
        self.assert_same_outputs(model, model)

    def test_deepcopy(self, model):
        """Copies, also of a model in training (legacy spectral norm fails there), and shares nothing with the copy."""
        self.loss(model.train(), self.sample()).backward()
        duplicate = copy.deepcopy(model).eval()
        self.assert_same_outputs(model.eval(), duplicate)
        with torch.no_grad():
            before = self.outputs(duplicate, self.sample())
            for parameter in model.parameters():
                parameter.zero_()
            for a, b in zip(before, self.outputs(duplicate, self.sample()), strict=True):
                assert torch.equal(a, b)

    def test_averaged_model_carries_buffers(self, model, tmp_path):
        """What a moving average saves must give the outputs that the average gave: diffusers' `EMAModel` does not."""
        average = AveragedModel(model, avg_fn=lambda averaged, current, _: torch.lerp(averaged, current, 0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model.train()
        for step in range(3):
            self.loss(model, self.sample(), step).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        for (name, averaged), current in zip(average.module.named_buffers(), model.buffers(), strict=True):
            assert torch.equal(averaged, current), name
        averaged_parameters = list(zip(average.module.parameters(), model.parameters(), strict=True))
        assert any(not torch.equal(averaged, current) for averaged, current in averaged_parameters)
        average.module.eval().save_pretrained(tmp_path)
        self.assert_same_outputs(average.module, type(model).from_pretrained(tmp_path))

    # Training

    @pytest.mark.parametrize("training", [False, True])
    def test_gradient_checkpointing(self, model, training):
        """It is applied, at every block and only where there is a gradient; and it changes no gradient by a bit."""
        plain = copy.deepcopy(model).train(training)
        self.loss(plain, self.sample()).backward()
        calls = []

        def counted_checkpoint(function, *args):
            calls.append(function)
            return checkpoint(function, *args, use_reentrant=False)

        model.enable_gradient_checkpointing(gradient_checkpointing_func=counted_checkpoint)
        model.train(training)
        assert model.is_gradient_checkpointing
        self.loss(model, self.sample()).backward()
        num_calls = len(calls)
        blocks = [module.blocks for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        assert num_calls >= sum(len(block_list) for block_list in blocks) > 0
        for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(parameter.grad, expected.grad), name
        assert all(module.training == training for module in model.modules())

        with torch.no_grad():
            self.loss(model, self.sample())
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing
        self.loss(model, self.sample()).backward()
        assert len(calls) == num_calls

    def test_gradient_checkpointing_by_default_function(self, model):
        plain = copy.deepcopy(model).train()
        model.enable_gradient_checkpointing()
        model.train()
        self.loss(plain, self.sample()).backward()
        self.loss(model, self.sample()).backward()
        for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(parameter.grad, expected.grad), name

    @pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
    def test_training_lowers_the_loss(self, model, autocast):
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(15):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = self.loss(model, self.sample())
            loss.backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        # In the energy's unit or in that of an ELBO, this margin is far above what rounding does.
        assert losses[-1] < losses[0] - 0.1 * abs(losses[0])
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


CONFIGS = {
    "group": {"norm_num_groups": 4, "act_fn": "gelu", "reconstruction_variance": 0.01},
    "batch": {"norm_type": "batch", "layers_per_block": 2},
}


def tiny(sample_size: int = 16, in_channels: int = 1, **kwargs) -> AutoencoderEC:
    torch.manual_seed(0)
    kwargs = {"latent_channels": 4, "block_out_channels": (8, 16), **kwargs}
    return AutoencoderEC(sample_size=sample_size, in_channels=in_channels, **kwargs)


def images(batch_size: int, in_channels: int = 1, sample_size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch_size, in_channels, sample_size, sample_size, generator=seeded(seed)) * 2 - 1


def latents(batch_size: int, latent_channels: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, latent_channels, 1, 1, generator=seeded(seed))


@pytest.fixture
def vae() -> AutoencoderEC:
    return unsettle(tiny(), images(3))


class TestAutoencoderECModel(ModelTests):
    @pytest.fixture(params=CONFIGS)
    def model(self, request):
        return unsettle(tiny(**CONFIGS[request.param]), self.sample())

    def sample(self, batch_size=3):
        return images(batch_size)

    def outputs(self, model, sample):
        output = model(sample, prior_latents=latents(2).to(sample.dtype))
        return [output.sample, output.latent_dist.parameters, output.prior_sample]

    def loss(self, model, sample, step=0):
        """The negative ELBO, beside a term on prior samples that stands for calibration."""
        output = model(sample, True, latents(2, seed=step), posterior_noise=latents(len(sample), seed=step + 1))
        squared_error = (output.sample - sample).square().flatten(1).sum(1).mean()
        return squared_error + output.latent_dist.kl().mean() + output.prior_sample.square().mean()


# Shapes and structure


@pytest.mark.parametrize("in_channels", [1, 3, 4])
@pytest.mark.parametrize("sample_size", [8, 16, 32, 64, 128, 256])
def test_shapes_and_range(sample_size, in_channels):
    """At every size and number of channels, down to 4 px. Images are in [-1, 1] whatever the latents are."""
    num_resolutions = sample_size.bit_length() - 2
    vae = tiny(sample_size, in_channels, block_out_channels=(8,) * num_resolutions).eval()
    # Weights as wild as this reach both ends of the range.
    unsettle(vae, images(1, in_channels, sample_size))
    with torch.no_grad():
        posterior = vae.encode(images(2, in_channels, sample_size)).latent_dist
        assert isinstance(posterior, DiagonalGaussianDistribution)
        for moment in (posterior.mean, posterior.std, posterior.logvar, posterior.mode(), posterior.sample()):
            assert moment.shape == (2, 4, 1, 1)
        decoded = vae.decode(100 * latents(2)).sample
        assert decoded.shape == (2, in_channels, sample_size, sample_size)
        assert decoded.min() >= -1 and decoded.max() <= 1 and decoded.std() > 0
        assert vae(images(2, in_channels, sample_size)).sample.shape == decoded.shape
    # Four doublings lie between 8 and 128 px, and 16 and 256 px: excitation is there from 128 px on.
    assert len(vae.decoder.excitations) == {128: 1, 256: 2}.get(sample_size, 0)


@pytest.mark.parametrize(
    "sample_size, block_out_channels, num_excitations",
    [
        (8, (8,), 0),
        (16, (16, 8), 0),
        (32, (8, 12, 16), 0),
        (64, (8,), 0),
        (64, (8,) * 5, 0),
        (128, (4, 8, 8, 12, 16), 1),
        (128, (4, 8, 8, 12), 0),
        (256, (4, 4, 8, 8, 16), 1),
    ],
)
def test_shorter_block_out_channels(sample_size, block_out_channels, num_excitations):
    """Any last resolution of at least 4 px will do; without one that is 16 times smaller there is no excitation."""
    vae = tiny(sample_size, block_out_channels=block_out_channels).eval()
    assert len(vae.decoder.excitations) == num_excitations
    with torch.no_grad():
        output = vae(images(2, 1, sample_size))
    assert output.sample.shape == (2, 1, sample_size, sample_size)
    assert output.latent_dist.mean.shape == (2, 4, 1, 1)


@pytest.mark.parametrize(
    "sample_size, block_out_channels", [(128, (4, 8, 8, 8, 12, 16)), (256, (4, 4, 8, 8, 8, 12, 16))]
)
def test_skip_layer_excitation_changes_the_image(sample_size, block_out_channels):
    """Each gate acts; with other widths at 4, 8 and 16 px, it could not read another resolution than its own."""
    vae = tiny(sample_size, block_out_channels=block_out_channels).eval()
    with torch.no_grad():
        reference = vae.decode(latents(1)).sample
        for excitation in vae.decoder.excitations.values():
            bias = excitation.conv2.bias.clone()
            excitation.conv2.bias += 2.0
            assert (vae.decode(latents(1)).sample - reference).abs().max() > 1e-3
            excitation.conv2.bias.copy_(bias)
        assert torch.equal(vae.decode(latents(1)).sample, reference)


def test_skip_layer_excitation_gates_channels():
    """One gate in (0, 1) a channel and image, from the low resolution alone."""
    excitation = tiny(128, block_out_channels=(8, 8, 8, 8, 12, 12)).decoder.excitations["5"]
    low, high = torch.randn(2, 12, 4, 4), torch.randn(2, 8, 128, 128).abs() + 1.0
    with torch.no_grad():
        gates = excitation(low, high) / high
        assert torch.allclose(gates, gates[:, :, :1, :1].expand_as(gates), rtol=1e-5)
        assert gates.min() > 0 and gates.max() < 1
        assert torch.allclose(excitation(low, torch.ones_like(high)), gates, rtol=1e-5)
        assert not torch.allclose(excitation(low.flip(0), high) / high, gates, rtol=1e-3)


@pytest.mark.parametrize(
    "channels, norm_num_groups, expected",
    [
        (64, 8, 8),
        (32, 8, 8),
        (16, 8, 4),
        (8, 8, 2),
        (4, 8, 1),
        (2, 8, 1),
        (16, 32, 4),
        (16, 1, 1),
        (9, 8, 1),
        (18, 8, 2),
    ],
)
def test_group_counts_adapt(channels, norm_num_groups, expected):
    """With 16 channels, 8 groups would be of 2: group normalization then nears instance normalization."""
    vae = tiny(8, block_out_channels=(channels,), norm_num_groups=norm_num_groups)
    norms = [module for module in vae.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert len(norms) == 6 and {norm.num_groups for norm in norms} == {expected}
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in vae.modules())


def test_batch_norm_everywhere():
    vae = tiny(norm_type="batch")
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in vae.modules())
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in vae.modules())


# The posterior


def test_kl_in_closed_form(vae):
    posterior = vae.encode(images(3)).latent_dist
    reference = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert posterior.kl().shape == (3,)
    assert torch.allclose(posterior.kl(), reference, rtol=1e-5)


def test_kl_by_monte_carlo(vae):
    """KL(q || p) is the mean of log q - log p over draws of q: `sample` and `kl` belong to the same Gaussian."""
    with torch.no_grad():
        posterior = DiagonalGaussianDistribution(vae.encode(images(3)).latent_dist.parameters.double())
        generator = seeded(0)
        draws = torch.stack([posterior.sample(generator) for _ in range(20_000)])
        log_ratio = Normal(posterior.mean, posterior.std).log_prob(draws) - Normal(0.0, 1.0).log_prob(draws)
        log_ratio = log_ratio.sum(dim=(2, 3, 4))
    standard_error = log_ratio.std(0) / len(draws) ** 0.5
    assert ((log_ratio.mean(0) - posterior.kl()).abs() < 5 * standard_error).all()
    assert (posterior.kl() > 20 * standard_error).all()


def test_posterior_is_float32_under_autocast(vae):
    """The KL divergence is a sum of small differences, which bfloat16 would round away."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = vae(images(3), True, latents(2), generator=seeded(0))
    assert output.latent_dist.parameters.dtype == output.latent_dist.kl().dtype == torch.float32
    assert torch.allclose(output.latent_dist.kl(), vae.encode(images(3)).latent_dist.kl(), rtol=0.05)


# The forward pass: reconstruction and generation in one


@pytest.mark.parametrize("sample_posterior", [False, True])
@pytest.mark.parametrize("num_prior_samples", [None, 1, 5])
def test_forward_is_encode_and_decode(vae, sample_posterior, num_prior_samples):
    sample, noise = images(3), latents(3, seed=1)
    prior = None if num_prior_samples is None else latents(num_prior_samples, seed=2)
    with torch.no_grad():
        output = vae(sample, sample_posterior, prior_latents=prior, posterior_noise=noise)
        posterior = vae.encode(sample).latent_dist
        assert torch.equal(output.latent_dist.parameters, posterior.parameters)
        z = posterior.mean + posterior.std * noise if sample_posterior else posterior.mean
        assert torch.allclose(output.sample, vae.decode(z).sample, atol=1e-5)
        if prior is None:
            assert output.prior_sample is None
        else:
            assert torch.allclose(output.prior_sample, vae.decode(prior).sample, atol=1e-5)


def test_generator_makes_the_posterior_reproducible(vae):
    sample = images(3)
    with torch.no_grad():
        first, second, other = (vae(sample, True, generator=seeded(seed)).sample for seed in (0, 0, 1))
        z = vae.encode(sample).latent_dist.sample(seeded(0))
        assert torch.equal(first, vae.decode(z).sample)
    assert torch.equal(first, second)
    assert not torch.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("prior", [False, True])
def test_tuple_and_dict_equivalence(vae, prior):
    kwargs = {"prior_latents": latents(2)} if prior else {}
    with torch.no_grad():
        output, as_tuple = vae(images(3), **kwargs), vae(images(3), return_dict=False, **kwargs)
        assert len(as_tuple) == (3 if prior else 2) and len(output.to_tuple()) == len(as_tuple)
        assert torch.equal(as_tuple[0], output.sample)
        assert torch.equal(as_tuple[1].parameters, output.latent_dist.parameters)
        if prior:
            assert torch.equal(as_tuple[2], output.prior_sample)
        (posterior,) = vae.encode(images(3), return_dict=False)
        assert torch.equal(posterior.parameters, vae.encode(images(3)).latent_dist.parameters)
        (decoded,) = vae.decode(latents(2), return_dict=False)
        assert torch.equal(decoded, vae.decode(latents(2)).sample)


def test_output_survives_accelerate(vae):
    """Under mixed precision Accelerate rebuilds what `forward` returns, with its tensors in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = vae(images(3), prior_latents=latents(2))
    converted = convert_to_fp32(output)
    assert isinstance(converted, AutoencoderECOutput)
    assert output.sample.dtype == torch.bfloat16 and converted.sample.dtype == torch.float32
    assert torch.equal(converted.sample, output.sample.float())
    assert torch.equal(converted.prior_sample, output.prior_sample.float())
    assert torch.equal(converted.latent_dist.parameters, output.latent_dist.parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_in_float32_for_any_model(vae, dtype):
    """Latents and noise are drawn in float32; they follow the precision of the model."""
    output = vae.to(dtype)(images(2).to(dtype), True, latents(3), latents(2, seed=1))
    assert output.sample.dtype == output.prior_sample.dtype == dtype
    assert torch.isfinite(output.sample).all() and torch.isfinite(output.prior_sample).all()


@pytest.mark.parametrize("norm_type", ["group", "batch"])
@pytest.mark.parametrize("sample_size, block_out_channels", [(16, (4, 8)), (128, (4, 4, 4, 4, 8))])
def test_every_parameter_gets_a_gradient(sample_size, block_out_channels, norm_type):
    """In one forward pass of prior and posterior: DistributedDataParallel waits for each of them."""
    vae = tiny(sample_size, block_out_channels=block_out_channels, norm_type=norm_type)
    sample = images(2, 1, sample_size)
    output = vae(sample, True, prior_latents=latents(2), generator=seeded(0))
    loss = F.mse_loss(output.sample, sample) + output.latent_dist.kl().mean() + output.prior_sample.square().mean()
    loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        # A bias before batch normalization is subtracted again: its gradient is 0 up to rounding.
        assert norm_type == "batch" or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("training", [False, True])
def test_group_norm_sees_one_image_at_a_time(vae, training):
    vae.train(training)
    batch = images(4)
    neighbours = torch.cat([batch[:1], images(3, seed=1)])
    with torch.no_grad():
        together, alone, beside_others = vae(batch), vae(batch[:1]), vae(neighbours)
        assert torch.equal(together.sample[0], beside_others.sample[0])
        assert torch.equal(together.latent_dist.parameters[0], beside_others.latent_dist.parameters[0])
    assert torch.allclose(together.sample[:1], alone.sample, atol=1e-5)
    assert torch.allclose(together.latent_dist.parameters[:1], alone.latent_dist.parameters, atol=1e-5)


def test_batch_norm_sees_the_batch_in_training_only():
    vae = unsettle(tiny(norm_type="batch"), images(3))
    batch = images(4)
    neighbours = torch.cat([batch[:1], images(3, seed=1)])
    with torch.no_grad():
        assert torch.equal(vae(batch).sample[0], vae(neighbours).sample[0])
        vae.train()
        assert not torch.allclose(vae(batch).sample[0], vae(neighbours).sample[0], atol=1e-3)


# Slicing


def test_slicing(vae):
    """One image at a time through either half, and the same outputs."""
    batches = []
    vae.encoder.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    vae.decoder.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
    with torch.no_grad():
        whole = vae(images(3), prior_latents=latents(2))
        assert batches == [3, 5]
        vae.enable_slicing()
        sliced = vae(images(3), prior_latents=latents(2))
        assert batches == [3, 5] + [1] * 8
        vae.disable_slicing()
        assert torch.equal(vae(images(3), prior_latents=latents(2)).sample, whole.sample)
        assert batches == [3, 5] + [1] * 8 + [3, 5]
    assert torch.allclose(sliced.sample, whole.sample, atol=1e-5)
    assert torch.allclose(sliced.prior_sample, whole.prior_sample, atol=1e-5)
    assert torch.allclose(sliced.latent_dist.parameters, whole.latent_dist.parameters, atol=1e-5)


def test_tiling_is_refused(vae):
    """The latent is global: tiles of it make no sense."""
    with pytest.raises(NotImplementedError, match="AutoencoderEC"):
        vae.enable_tiling()


# What training writes into the config


def test_reconstruction_variance_is_saved(vae, tmp_path):
    assert vae.config.reconstruction_variance is None
    vae.register_to_config(reconstruction_variance=0.0123)
    vae.save_pretrained(tmp_path)
    assert AutoencoderEC.from_pretrained(tmp_path).config.reconstruction_variance == 0.0123


# Refusals


@pytest.mark.parametrize(
    "kwargs, name",
    [
        ({"sample_size": 48}, "sample_size"),
        ({"sample_size": 4}, "sample_size"),
        ({"sample_size": 512}, "sample_size"),
        ({"in_channels": 2}, "in_channels"),
        ({"in_channels": 0}, "in_channels"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"block_out_channels": (8, 8, 8, 8)}, "block_out_channels"),
        ({"sample_size": 8, "block_out_channels": (8, 8, 8)}, "block_out_channels"),
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"block_out_channels": (8, 0)}, "block_out_channels"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"norm_type": "layer"}, "norm_type"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"act_fn": "sine"}, "activation function sine"),
    ],
)
def test_invalid_arguments(kwargs, name):
    with pytest.raises(ValueError, match=name):
        tiny(**kwargs)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 8, 8), (2, 1, 16, 8), (1, 16, 16), (2, 1, 32, 32)])
def test_encode_refuses_other_shapes(vae, shape):
    with pytest.raises(ValueError, match=r"`x` must have shape \(batch_size, 1, 16, 16\)"):
        vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="`x` must have shape"):
        vae(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 1, 1), (2, 4, 2, 2), (4, 1, 1), (2, 8, 1, 1)])
def test_decode_refuses_other_shapes(vae, shape):
    with pytest.raises(ValueError, match=r"`z` must have shape \(batch_size, 4, 1, 1\)"):
        vae.decode(torch.zeros(shape))
