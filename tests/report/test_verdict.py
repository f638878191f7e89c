# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the verdict of a report finds in healthy and in sick runs."""

import math

import pytest
from report_runs import ARGUMENTS, write_lines, write_run

from ecvae_diffusers.report.read import Run
from ecvae_diffusers.report.verdict import Finding, findings


def judged(folder) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings(Run.read(folder))}


def test_healthy_run(tmp_path):
    run = write_run(tmp_path / "run")
    write_lines(run / "events.jsonl", [{"step": 300, "kind": "rollback", "message": "", "to_step": 200}])
    found = judged(run)
    assert len(found) == 9 and all(finding.healthy for finding in found.values())
    assert "rollbacks: 1" in found["Guard events"].seen


def test_sick_run(tmp_path):
    def change(one: dict) -> dict:
        if one["step"] <= 1000:
            return one
        sick = {"dual": 100.0, "constraint": 0.2, "drift": 0.03, "sample_spread": 0.004, "energy_targets": 0.6}
        return {**one, **sick, "active_units": 1.0, "energy_gradient_norm": 1e-4, "kl": math.nan}

    run = write_run(tmp_path / "sick", change=change)
    write_lines(run / "events.jsonl", [{"step": 1900, "kind": "warning", "message": "lambda at its bound"}])
    found = judged(run)
    for name, seen in {
        "Numbers": "kl", "Dual variable lambda": "upper bound (100) in 100%", "Constraint": "13.07", "Drift of the chain": "4.05",
        "Energy gap": "+20.00", "Energy model": "0.0", "Variety of samples": "0.01", "Active units": "1 of 32",
        "Guard events": "lambda at its bound",
    }.items():  # fmt: skip
        finding = found.pop(name)
        assert not finding.healthy and seen in finding.seen and finding.remedy, finding
    assert not found


@pytest.mark.parametrize(
    "dual, rate, initial, seen, remedy",
    [
        (10.0, 0.1, 1.0, "at its upper bound (10) in 100%", "--max_posterior_dual"),
        (3.0, 0.1, 1.0, "3, inside its bounds 0 and 10", None),
        (10.0, 0.0, 1.0, None, None),  # a weight that the user chose
        (10.0, 0.1, 10.0, None, None),  # it begins at its bound: a fixed weight is meant
        (0.0, 0.1, 10.0, "at 0 in 100%", "calibration"),
    ],
)
def test_a_posterior_pinned_at_a_bound(tmp_path, dual, rate, initial, seen, remedy):
    own = {"max_posterior_dual": 10.0, "dual_learning_rate": rate, "initial_posterior_dual": initial}
    run = write_run(tmp_path / "run", 300, ARGUMENTS | own, change=lambda one: one | {"posterior_dual": dual})
    finding = judged(run).get("Posterior's lambda")
    assert (finding is None) == (seen is None)
    if finding is not None:
        assert seen in finding.seen and finding.healthy == (remedy is None) and (remedy or "") in finding.remedy
