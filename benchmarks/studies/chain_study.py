#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Compare settings of the chain: `python benchmarks/studies/chain_study.py --output_dir STUDY`, digits; `--fashion_mnist DATASET`.

Each row trains the demo's networks with one setting, and measures samples of the averaged weights. A row also compares the
chain with a single gradient step: it has the cosine between the chain's move without noise and the energy's gradient at its
start. Rows are kept in STUDY/chain_<data>.jsonl, so an interrupted study resumes.
"""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study


VAE = ["--calibration", "none"]


def chain(num_steps: int, total_drift: float) -> list[str]:
    return ["--langevin_steps", str(num_steps), "--langevin_drift_step", str(total_drift / num_steps)]


K_1 = ["--langevin_steps", "1"]
# Ways to bound the energy model's gradient. SPECTRAL_NORM was the default of version 0.1, with which the tables were made.
NO_PENALTY = ["--energy_gradient_penalty", "0"]
SPECTRAL_NORM = ["--energy_spectral_norm", "--energy_learning_rate", "5e-4", "--adam_beta2", "0.9", *NO_PENALTY]
# The defaults are K 5, drift step and tolerance "auto", noise 1e-3, beta 1. Rows that name a drift fix the total drift step
# K a of the chain.
SETTINGS = {
    **{f"VAE, beta {beta:g}": [*VAE, "--kl_weight", str(beta)] for beta in (0.1, 0.3, 1.0, 3.0)},
    "EC-VAE (defaults)": [],
    **{f"K {k}, drift {drift:g}": chain(k, drift) for k in (1, 5, 15) for drift in (0.25, 1.0, 4.0)},
    **{
        f"K {k}, drift 1, noise {noise:g}": [*chain(k, 1.0), "--langevin_noise", str(noise)]
        for k in (1, 5, 15)
        for noise in (0.0, 0.01)
    },
    **{
        f"K 5, drift {drift:g}, beta {beta:g}": [*chain(5, drift), "--kl_weight", str(beta)]
        for drift in (0.25, 1.0, 4.0)
        for beta in (0.3, 3.0)
    },
    "K 5, drift 0.25, tolerance 0.0037": [*chain(5, 0.25), "--drift_tolerance", "0.0037"],
    "K 1": K_1,
    "K 15": ["--langevin_steps", "15"],
    **{f"tolerance {tolerance:g}": ["--drift_tolerance", str(tolerance)] for tolerance in (0.0037, 0.015, 0.03)},
    "all in bf16": ["--mixed_precision", "bf16"],
    "lambda fixed at 30": ["--dual_learning_rate", "0"],
    "alpha 0": ["--energy_regularization", "0"],
    "spectral norm": SPECTRAL_NORM,
    "spectral norm, K 1": [*SPECTRAL_NORM, *K_1],
    "spectral norm and gradient penalty 1": [*SPECTRAL_NORM, "--energy_gradient_penalty", "1"],
    "no penalty": NO_PENALTY,
    "gradient penalty 1": ["--energy_gradient_penalty", "1"],
}
COLUMNS = {
    **study.FRECHET,
    "kernel distance": study.middle("kernel_distance", ".4f"),
    "recall": study.middle("recall", ".2f"),
    "coverage": study.middle("coverage", ".2f"),
    "lambda": study.middle("dual", ".0f"),
    "drift": study.middle("drift", ".4f"),
    "cosine": study.middle("cosine_to_critic", ".4f"),
    "rollbacks": study.each("rollbacks", "d"),
}


def main() -> None:
    args = study.parser(__doc__, list(SETTINGS)).parse_args()

    def make(data, name: str, seed: int) -> dict:
        folder = study.run_folder(args.output_dir, data.name, name, seed)
        study.train(data, folder, seed, args.max_train_steps, *SETTINGS[name])
        return study.trained_row(data, folder)

    results = study.run_on_either(args, "chain", make, arguments=SETTINGS)
    if args.dataset is None:
        # The 64 features of the digit classifier are not normalized, so the cubic kernel gives noise.
        del COLUMNS["kernel distance"]
    print(results.table("setting", list(SETTINGS), COLUMNS))


if __name__ == "__main__":
    main()
