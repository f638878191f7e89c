# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The sampling benchmark at toy size: its rows, not its times. Slow: `make test-slow`."""

import pytest

from speed import sampling
from speed.sampling import OURS, UNET


LANGEVIN = "ECVAEPipeline, 16 Langevin steps"
PEERS = {
    "DDPM, 1000 steps": 1000,
    "DDIM, 50 steps": 50,
    "DPM-Solver++, 20 steps": 20,
    "score SDE (VE), 2000 steps": 4000,
    "consistency model, 1 step": 1,
    "consistency model, 2 steps": 2,
}
SMALL = {
    "vae": {"sample_size": 16, "block_out_channels": (8, 16), "latent_channels": 8},
    "energy": {"sample_size": 16, "block_out_channels": (8, 16)},
    "unet": UNET | {"sample_size": 16, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
}


def test_rows_of_the_samplers(capsys, monkeypatch):
    monkeypatch.setattr(sampling, "SIZES", SMALL)
    counts = ["--batch_sizes", "1", "3", "--peer_batch_sizes", "3", "--timed_steps", "2", "--rounds", "1"]
    sampling.main(counts)
    head, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[1:]]
    rows = [dict(zip(head, [cells[0], *map(float, cells[1:])], strict=True)) for cells in lines]
    assert [row["sampler"] for row in rows if row["batch"] == 1] == [OURS, LANGEVIN]
    at_three = {row["sampler"]: row for row in rows if row["batch"] == 3}
    evaluations = {name: row["evaluations per image"] for name, row in at_three.items()}
    assert evaluations == {OURS: 1, LANGEVIN: 17, **PEERS}

    # One UNet makes all peers, so its operations are each one's over its evaluations.
    for name, count in PEERS.items():
        one = at_three["consistency model, 1 step"]["GMAC per image"]
        assert at_three[name]["GMAC per image"] / count == pytest.approx(one, rel=1e-3)
    assert at_three[LANGEVIN]["GMAC per image"] > at_three[OURS]["GMAC per image"]

    # There is one round, so that ratios of medians are medians of ratios.
    ours = at_three[OURS]
    for row in at_three.values():
        promised, slower = row["promised by operations"], row[f"times slower than {OURS}"]
        assert promised == pytest.approx(row["GMAC per image"] / ours["GMAC per image"], rel=1e-3)
        assert slower == pytest.approx(row["ms per batch"] / ours["ms per batch"], rel=1e-3)
        assert row["ms per image"] == pytest.approx(row["ms per batch"] / 3, rel=1e-3)
        assert row["images per second"] == pytest.approx(1e3 / row["ms per image"], rel=1e-3)
