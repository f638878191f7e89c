# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tests that every model passes, after the mixins of diffusers' own tests, and helpers of tests of models."""

import copy
import itertools
import json
import logging
import pickle
import re

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import EMAModel
from safetensors.torch import load, load_file, save_file
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch_size: int, in_channels: int = 1, sample_size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch_size, in_channels, sample_size, sample_size, generator=seeded(seed)) * 2 - 1


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
    """
    A subclass gives the fixture `model` (evaluation mode, unsettled), and the methods below. It is not collected by itself.
    """

    def sample(self, batch_size: int = 3) -> torch.Tensor:
        raise NotImplementedError

    def outputs(self, model: torch.nn.Module, sample: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of a forward pass, as tensors."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, sample: torch.Tensor, step: int = 0) -> torch.Tensor:
        """What training minimizes, with the same random numbers at the same `step`."""
        raise NotImplementedError

    def assert_same_outputs(self, model: torch.nn.Module, other: torch.nn.Module):
        # Copies lie in aligned memory. What safetensors loads does not: a dot product (of spectral norm) may be summed in another
        # order, and the last bit differ although the states are equal.
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
        """Bit-equal, including the buffers of batch norm; `low_cpu_mem_usage` builds it without memory. It can be trained."""
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not loaded.training
        assert not any(tensor.is_meta for tensor in itertools.chain(loaded.parameters(), loaded.buffers()))
        self.assert_same_state(model, loaded)
        self.assert_same_outputs(model, loaded)
        self.loss(loaded.train(), self.sample()).backward()
        assert trained_parameters(loaded).keys() == trained_parameters(model).keys()
        assert all(parameter.grad is not None for parameter in trained_parameters(loaded).values())

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
        if variant is not None:
            with pytest.raises(OSError, match="diffusion_pytorch_model"):
                type(model).from_pretrained(tmp_path)

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

    def test_deepcopy(self, model):
        """Copies, also of a model in training (legacy spectral norm fails there), and shares nothing with the copy."""
        self.loss(model.train(), self.sample()).backward()
        duplicate = copy.deepcopy(model).eval()
        self.assert_same_outputs(model.eval(), duplicate)
        with torch.no_grad():
            before = self.outputs(duplicate, self.sample())
            for parameter in trained_parameters(model).values():
                parameter.zero_()
            for a, b in zip(before, self.outputs(duplicate, self.sample()), strict=True):
                assert torch.equal(a, b)

    def test_averaged_model_carries_buffers(self, model, tmp_path):
        """What a moving average saves must give the outputs that the average gave."""
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

    def test_ema_model_round_trip(self, model, tmp_path):
        """diffusers' `EMAModel` rebuilds a model of its config and its parameters, with its own settings in the config."""
        if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
            pytest.skip("The statistics of batch normalization are buffers, which EMAModel does not keep.")
        average = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
        self.loss(model.train(), self.sample()).backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        average.step(model.parameters())
        average.save_pretrained(tmp_path)
        average.copy_to(model.parameters())
        loaded = type(model).from_pretrained(tmp_path)
        self.assert_same_state(model, loaded)
        self.assert_same_outputs(model.eval(), loaded)
        again = EMAModel.from_pretrained(tmp_path, type(model))
        assert (again.decay, again.optimization_step) == (0.5, 1)

    # What diffusers and Accelerate hook into

    def assert_nearly_same_outputs(self, model, other, tolerance: float = 0.0):
        with torch.no_grad():
            for a, b in zip(self.outputs(model, self.sample()), self.outputs(other, self.sample()), strict=True):
                assert (a - b).abs().max() <= tolerance * a.abs().max()

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
            self.assert_nearly_same_outputs(model, offloaded)

    @pytest.mark.parametrize("storage, tolerance", [(torch.float16, 0.01), (torch.float8_e4m3fn, 0.5)])
    def test_layerwise_casting(self, model, storage, tolerance):
        """Weights are stored in few bits and computed with in float32: they are rounded, and nothing else is."""
        cast = copy.deepcopy(model)
        cast.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        assert any(parameter.dtype == storage for parameter in cast.parameters())
        self.assert_nearly_same_outputs(model, cast, tolerance)

    def test_export(self, model):
        exported = torch.export.export(model, args=(), kwargs={"sample": self.sample()}).module()
        with torch.no_grad():
            output, expected = exported(sample=self.sample()), model(self.sample())
        assert type(output) is type(expected)
        for name, value in expected.items():
            a, b = (getattr(one, "parameters", one) for one in (value, output[name]))
            assert torch.equal(a, b), name

    @pytest.mark.parametrize("training", [False, True])
    def test_pickle(self, model, training):
        """As spawned processes need it; global random numbers are left alone."""
        state = torch.get_rng_state()
        loaded = pickle.loads(pickle.dumps(model.train(training)))
        assert torch.equal(torch.get_rng_state(), state)
        assert loaded.training == training and type(loaded) is type(model)
        assert trained_parameters(loaded).keys() == trained_parameters(model).keys()
        self.assert_same_state(model, loaded)
        self.assert_same_outputs(model.eval(), loaded.eval())
        self.assert_same_outputs(model, copy.deepcopy(loaded))

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
        for name, parameter in trained_parameters(model).items():
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name
        assert all(module.training == training for module in model.modules())

        with torch.no_grad():
            self.loss(model, self.sample())
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing
        self.loss(model, self.sample()).backward()
        assert len(calls) == num_calls
        # With diffusers' own function.
        other = copy.deepcopy(plain)
        other.zero_grad()
        plain.zero_grad()
        other.enable_gradient_checkpointing()
        for one in (plain, other):
            self.loss(one, self.sample()).backward()
        for name, parameter in trained_parameters(other).items():
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad), name

    @pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
    def test_training_lowers_the_loss(self, model, autocast):
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(15):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = self.loss(model, self.sample())
            loss.backward()
            for name, parameter in trained_parameters(model).items():
                assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        # In the energy's unit or in that of an ELBO, this margin is far above what rounding does.
        assert losses[-1] < losses[0] - 0.1 * abs(losses[0])
        assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())

    def test_a_pickle_is_refused(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        weights = tmp_path / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
        with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
            type(model).from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="use_safetensors"):
            type(model).from_pretrained(tmp_path, use_safetensors=False)
        for arguments in ((True, None, False), ()):  # by place, as diffusers has it, or by name
            kwargs = {} if arguments else {"safe_serialization": False}
            with pytest.raises(ValueError, match="safe_serialization"):
                model.save_pretrained(tmp_path / "new", *arguments, **kwargs)
        assert not (tmp_path / "new").exists()

    def test_damaged_weights_are_refused(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        weights = tmp_path / "diffusion_pytorch_model.safetensors"
        content = weights.read_bytes()
        whole = load(content)
        weights.write_bytes(content[:-10])
        with pytest.raises(OSError):
            type(model).from_pretrained(tmp_path)
        missing = sorted(whole)[0]
        save_file({name: value for name, value in whole.items() if name != missing}, weights, {"format": "pt"})
        with pytest.raises(ValueError, match=re.escape(missing)):
            type(model).from_pretrained(tmp_path)
        for value in (float("nan"), float("inf")):
            save_file({**whole, missing: torch.full_like(whole[missing], value)}, weights, {"format": "pt"})
            with pytest.raises(ValueError, match=re.escape(missing)):
                type(model).from_pretrained(tmp_path)
        weights.write_bytes(content)
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == []
        self.assert_same_outputs(loaded, model)

    def test_an_unknown_key_of_a_config_is_warned_of(self, model, tmp_path, caplog, monkeypatch):
        """As by diffusers, whose own classes write such keys: `EMAModel` its settings."""
        monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
        model.register_to_config(num_wings=2)
        model.save_pretrained(tmp_path)
        self.assert_same_outputs(model, type(model).from_pretrained(tmp_path))
        assert "num_wings" in caplog.text
