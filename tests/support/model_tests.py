# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tests that every model passes, after the mixins of diffusers' own tests, and helpers of tests of models."""

import copy
import pickle
import re

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import EMAModel
from energies import seeded
from safetensors.torch import load, save_file
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from ecvae_diffusers.checks import height_and_width


def images(
    batch_size: int, in_channels: int = 1, sample_size: int | tuple[int, int] = 16, seed: int = 0
) -> torch.Tensor:
    """Return uniform images in [-1, 1]. `sample_size` is that of a config."""
    size = height_and_width(sample_size)
    return torch.rand(batch_size, in_channels, *size, generator=seeded(seed)) * 2 - 1


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def unsettle(model: torch.nn.Module, sample: torch.Tensor) -> torch.nn.Module:
    """
    Move every parameter and buffer away from its value at construction, so that a part that is not saved, loaded or copied shows.
    """
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
        model.train()
        for _ in range(3):
            model(sample)
    return model.eval()


class ModelTests:
    """A subclass gives the fixture `model` (evaluation mode, unsettled), and the methods below. It is not collected by itself."""

    def sample(self) -> torch.Tensor:
        raise NotImplementedError

    def outputs(self, model: torch.nn.Module, sample: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of a forward pass, as tensors."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, sample: torch.Tensor) -> torch.Tensor:
        """What training minimizes, with the same random numbers each time."""
        raise NotImplementedError

    def assert_same(self, model: torch.nn.Module, other: torch.nn.Module):
        """States and outputs are equal to the last bit."""
        state, other_state = model.state_dict(), other.state_dict()
        assert state.keys() == other_state.keys()
        for name in state:
            assert state[name].dtype == other_state[name].dtype and torch.equal(state[name], other_state[name]), name
        # Copies lie in aligned memory. What safetensors loads does not: a dot product (of spectral norm) may be summed in another
        # order, and the last bit differ although the states are equal.
        self.assert_nearly_same(copy.deepcopy(model).eval(), copy.deepcopy(other).eval())

    def assert_nearly_same(self, model: torch.nn.Module, other: torch.nn.Module, tolerance: float = 0.0):
        sample = self.sample()
        with torch.no_grad():
            for a, b in zip(self.outputs(model, sample), self.outputs(other, sample.to(other.dtype)), strict=True):
                assert (a.double() - b.double()).abs().max() <= tolerance * a.abs().max()

    def assert_same_gradients(self, model: torch.nn.Module, other: torch.nn.Module):
        for name, parameter in trained_parameters(model).items():
            assert torch.equal(parameter.grad, other.get_parameter(name).grad), name

    # Saving, loading and copying

    @pytest.mark.parametrize("low_cpu_mem_usage, variant", [(False, None), (True, None), (True, "fp16")])
    def test_from_save_pretrained(self, model, tmp_path, low_cpu_mem_usage, variant):
        """
        Bit-equal, including the buffers of batch norm, also as a variant in shards; `low_cpu_mem_usage` builds it without memory. It
        can be trained.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        model.save_pretrained(tmp_path, variant=variant, max_shard_size=size if variant is None else size // 3)
        assert variant is None or len(list(tmp_path.glob(f"diffusion_pytorch_model.{variant}-*"))) >= 3
        loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, variant=variant)
        assert not loaded.training
        self.assert_same(model, loaded)
        with pytest.raises(ValueError, match="safe_serialization"):
            model.save_pretrained(tmp_path, safe_serialization=False)
        self.loss(loaded.train(), self.sample()).backward()
        assert trained_parameters(loaded).keys() == trained_parameters(model).keys()
        assert all(parameter.grad is not None for parameter in trained_parameters(loaded).values())

    # Rounding to 8 (bfloat16) or 11 (float16) bits, through a few layers; float64 gives float32's own.
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.01), (torch.bfloat16, 0.1), (torch.float64, 1e-5)])
    def test_loading_dtype(self, model, tmp_path, dtype, tolerance):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
        # Batch normalization counts in integers.
        assert {tensor.dtype for tensor in loaded.state_dict().values()} <= {dtype, torch.int64}
        self.assert_nearly_same(model, loaded, tolerance)

    def test_config_round_trip(self, model, tmp_path):
        """`from_config` is what EMA and pipelines rebuild a model with: it must lose no argument."""
        rebuilt = type(model).from_config(model.config)
        assert dict(rebuilt.config) == dict(model.config)
        rebuilt.load_state_dict(model.state_dict())
        self.assert_same(model, rebuilt)
        # Compilation by blocks looks for these names, and silently does nothing where there is none.
        names = {type(module).__name__ for module in model.modules()}
        assert model._repeated_blocks and set(model._repeated_blocks) <= names & set(model._no_split_modules)

    @pytest.mark.parametrize("training", [False, True])
    def test_copies(self, model, training):
        """By pickle, as spawned processes need it, and by `deepcopy`, also after a step; global random numbers are left alone."""
        state = torch.get_rng_state()
        loaded = pickle.loads(pickle.dumps(model.train(training)))
        assert torch.equal(torch.get_rng_state(), state)
        assert loaded.training == training and type(loaded) is type(model)
        assert trained_parameters(loaded).keys() == trained_parameters(model).keys()
        self.assert_same(model, loaded)
        self.loss(model, self.sample()).backward()
        duplicate = copy.deepcopy(model)
        self.assert_same(model, duplicate)
        before = copy.deepcopy(duplicate.state_dict())
        with torch.no_grad():
            for parameter in trained_parameters(model).values():
                parameter.zero_()
        assert all(torch.equal(value, before[name]) for name, value in duplicate.state_dict().items())

    def test_averages(self, model, tmp_path):
        """A moving average is saved as the model that it gave: by torch with buffers, by diffusers without."""
        average = AveragedModel(model, avg_fn=lambda averaged, current, _: torch.lerp(averaged, current, 0.5))
        ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
        for _ in range(2):
            self.loss(model.train(), self.sample()).backward()
            torch.optim.SGD(model.parameters(), lr=1e-3).step()
            average.update_parameters(model)
        ema.step(model.parameters())
        for (name, averaged), current in zip(average.module.named_buffers(), model.buffers(), strict=True):
            assert torch.equal(averaged, current), name
        average.module.eval().save_pretrained(tmp_path / "average")
        self.assert_same(average.module, type(model).from_pretrained(tmp_path / "average"))
        if not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
            ema.save_pretrained(tmp_path / "ema")
            ema.copy_to(model.parameters())
            self.assert_same(model, type(model).from_pretrained(tmp_path / "ema"))

    # What diffusers and Accelerate hook into

    @pytest.mark.parametrize("offload_type", ["sequential", "leaf_level", "block_level"])
    def test_offload(self, model, offload_type, tmp_path):
        """By Accelerate to the CPU, or by diffusers to a disk: between the passes of its modules the weights are elsewhere."""
        offloaded, cpu = copy.deepcopy(model), torch.device("cpu")
        if offload_type == "sequential":
            accelerate.cpu_offload(offloaded, execution_device=cpu)
            assert all(parameter.is_meta for parameter in offloaded.parameters())
        else:
            blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
            apply_group_offloading(offloaded, cpu, cpu, offload_type, offload_to_disk_path=str(tmp_path), **blocks)
        for _ in range(2):
            self.assert_nearly_same(model, offloaded)

    def test_layerwise_casting(self, model):
        """Weights are stored in few bits and computed with in float32: they are rounded, and nothing else is."""
        cast = copy.deepcopy(model)
        cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert any(parameter.dtype == torch.float8_e4m3fn for parameter in cast.parameters())
        self.assert_nearly_same(model, cast, 0.5)

    def test_export(self, model):
        exported = torch.export.export(model, args=(), kwargs={"sample": self.sample()}).module()
        with torch.no_grad():
            output, expected = exported(sample=self.sample()), model(self.sample())
        assert type(output) is type(expected)
        for name, value in expected.items():
            a, b = (getattr(one, "parameters", one) for one in (value, output[name]))
            assert torch.equal(a, b), name

    # Training

    @pytest.mark.parametrize("training", [False, True])
    def test_gradient_checkpointing(self, model, training):
        """It is applied, at every block and only where there is a gradient; and it changes no gradient by a bit."""
        plain, by_diffusers, calls = copy.deepcopy(model), copy.deepcopy(model), []

        def counted_checkpoint(function, *args):
            calls.append(function)
            return checkpoint(function, *args, use_reentrant=False)

        model.enable_gradient_checkpointing(gradient_checkpointing_func=counted_checkpoint)
        by_diffusers.enable_gradient_checkpointing()
        for one in (plain, model, by_diffusers):
            self.loss(one.train(training), self.sample()).backward()
            self.assert_same_gradients(one, plain)
        num_calls = len(calls)
        blocks = [module.blocks for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        assert num_calls >= sum(len(block_list) for block_list in blocks) > 0
        assert all(module.training == training for module in model.modules())
        with torch.no_grad():
            self.loss(model, self.sample())
        model.disable_gradient_checkpointing()
        self.loss(model, self.sample()).backward()
        assert len(calls) == num_calls

    def test_training_lowers_the_loss(self, model):
        """Under autocast, with gradients in float32."""
        optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=3e-3), []
        for _ in range(15):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = self.loss(model, self.sample())
            loss.backward()
            assert all(parameter.grad.dtype == torch.float32 for parameter in trained_parameters(model).values())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        # In the energy's unit or in that of an ELBO, this margin is far above what rounding does.
        assert losses[-1] < losses[0] - 0.1 * abs(losses[0])

    # Refusals

    def test_damaged_weights_and_pickles_are_refused(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        weights = tmp_path / "diffusion_pytorch_model.safetensors"
        content = weights.read_bytes()
        whole = load(content)
        first = sorted(whole)[0]
        broken = [{**whole, first: torch.full_like(whole[first], value)} for value in (float("nan"), float("inf"))]
        for tensors in ({name: value for name, value in whole.items() if name != first}, *broken):
            save_file(tensors, weights, {"format": "pt"})
            with pytest.raises(ValueError, match=re.escape(first)):
                type(model).from_pretrained(tmp_path)
        weights.write_bytes(content[:-10])
        with pytest.raises(OSError):
            type(model).from_pretrained(tmp_path)
        weights.unlink()
        torch.save(whole, weights.with_suffix(".bin"))
        for use_safetensors in (None, False):
            with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
                type(model).from_pretrained(tmp_path, use_safetensors=use_safetensors)
