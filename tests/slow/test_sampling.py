# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The sampling benchmark at toy size: its rows, not its times."""

import pytest
import torch

from speed.sampling import COLUMNS, OURS, SMALL, cells, compare, make_samplers


LANGEVIN = "ECVAEPipeline, 16 Langevin steps"
PEERS = {
    "DDPM, 1000 steps": 1000,
    "DDIM, 50 steps": 50,
    "DPM-Solver++, 20 steps": 20,
    "score SDE (VE), 2000 steps": 4000,
    "consistency model, 1 step": 1,
    "consistency model, 2 steps": 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_samplers(dtype):
    cpu = torch.device("cpu")
    samplers = make_samplers(SMALL, 2, cpu, dtype)
    rows = list(compare(samplers, [1, 3], [3], cpu, rounds=1, least_seconds=0))
    assert [row["sampler"] for row in rows if row["batch_size"] == 1] == [OURS, LANGEVIN]
    at_three = {row["sampler"]: row for row in rows if row["batch_size"] == 3}
    assert {name: row["evaluations"] for name, row in at_three.items()} == {OURS: 1, LANGEVIN: 17, **PEERS}

    # One UNet makes all peers, so its operations are each one's over its evaluations.
    for name in PEERS:
        one = at_three[name]["gmac"] / at_three[name]["evaluations"]
        assert one == pytest.approx(at_three["consistency model, 1 step"]["gmac"])
    assert at_three[LANGEVIN]["gmac"] > at_three[OURS]["gmac"]

    for row in rows:
        ours = next(other for other in rows if (other["sampler"], other["batch_size"]) == (OURS, row["batch_size"]))
        assert row["promised"] == pytest.approx(row["gmac"] / ours["gmac"])
        # There is one round, so that ratios of medians are medians of ratios.
        assert row["times_slower"] == pytest.approx(row["ms_per_batch"] / ours["ms_per_batch"])
        assert row["ms_per_image"] == pytest.approx(row["ms_per_batch"] / row["batch_size"])
        assert row["images_per_second"] == pytest.approx(1e3 / row["ms_per_image"])
        assert len(cells(row, 2)) == len(COLUMNS)
