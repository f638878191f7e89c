#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""How the chain should be set: `python benchmarks/chain_study.py --output_dir STUDY`, digits; `--fashion_mnist DATASET`.

Each row trains the demo's networks with one setting of the chain, and measures samples of the averaged weights. Rows that
STUDY/chain_<data>.jsonl holds already are not made again, so that the study can be cut off and gone on with. A row also says
how far the chain is from a critic: the cosine between its move without noise and the energy's gradient at its start.
"""

from pathlib import Path

from command_line import picture_file
from study import (
    Results,
    data_name,
    load_data,
    median,
    open_results,
    parser,
    plot_curves,
    train,
    trained_row,
    versions,
)


VAE = ["--calibration", "none"]


def chain(num_steps: int, total_drift: float) -> list[str]:
    return ["--langevin_steps", str(num_steps), "--langevin_drift_step", str(total_drift / num_steps)]


# The defaults are K 5, drift step and tolerance "auto" (0.0074 a pixel), noise 1e-3, no conditioning, beta 1. Rows that name a
# drift fix the chain's total drift step K a.
SETTINGS = {f"VAE, beta {beta:g}": [*VAE, "--kl_weight", str(beta)] for beta in (0.1, 0.3, 1.0, 3.0)}
SETTINGS |= {"EC-VAE (defaults)": []}
SETTINGS |= {
    f"K {num_steps}, drift {drift:g}": chain(num_steps, drift)
    for num_steps in (1, 5, 15)
    for drift in (0.25, 1.0, 4.0)
}
SETTINGS |= {
    f"K {num_steps}, drift 1, noise {noise:g}": [*chain(num_steps, 1.0), "--langevin_noise", str(noise)]
    for num_steps in (1, 5, 15)
    for noise in (0.0, 0.01)
}
# w a is the share of the way back to the start that the pull takes in a step.
SETTINGS |= {
    f"K {num_steps}, drift 1, w a {pull:g}": [*chain(num_steps, 1.0), "--conditioning_weight", str(pull * num_steps)]
    for num_steps in (5, 15)
    for pull in (0.2, 0.8)
}
SETTINGS |= {
    f"K 5, drift {drift:g}, beta {beta:g}": [*chain(5, drift), "--kl_weight", str(beta)]
    for drift in (0.25, 1.0, 4.0)
    for beta in (0.3, 3.0)
}
SETTINGS |= {"K 5, drift 0.25, tolerance 0.0037": [*chain(5, 0.25), "--drift_tolerance", "0.0037"]}
SETTINGS |= {"two chains": ["--num_chains", "2"]}
SETTINGS |= {"K 1": ["--langevin_steps", "1"], "K 15": ["--langevin_steps", "15"]}
SETTINGS |= {f"tolerance {tolerance:g}": ["--drift_tolerance", str(tolerance)] for tolerance in (0.0037, 0.015, 0.03)}
SETTINGS |= {
    "chain in bf16": ["--langevin_dtype", "bf16"],
    "all in bf16": ["--mixed_precision", "bf16"],
    "lambda fixed at 30": ["--dual_learning_rate", "0"],
    "VAE, batch norm": [*VAE, "--norm_type", "batch"],
    "batch norm": ["--norm_type", "batch"],
    "no spectral norm": ["--no-energy_spectral_norm"],
    "alpha 0": ["--energy_regularization", "0"],
    "energy act_fn silu": ["--energy_act_fn", "silu"],
}
PENALTY = ["--no-energy_spectral_norm", "--energy_gradient_penalty"]
SETTINGS |= {f"gradient penalty {gamma:g}": [*PENALTY, str(gamma)] for gamma in (0.1, 1.0)}
SETTINGS |= {
    "gradient penalty 0.1, faster energy model": [
        *PENALTY, "0.1", "--energy_learning_rate", "1e-3", "--energy_adam_beta2", "0.99", "--adam_beta2", "0.99",
    ],
    "gradient penalty 0.1, faster energy model, K 1": [
        *PENALTY, "0.1", "--energy_learning_rate", "1e-3", "--energy_adam_beta2", "0.99", "--adam_beta2", "0.99",
        "--langevin_steps", "1",
    ],
    "gradient penalty 1 with spectral norm": ["--energy_gradient_penalty", "1.0"],
}  # fmt: skip


def table(results: Results) -> str:
    lines = [
        "| setting | Frechet distance, each seed | median | kernel distance | recall | coverage | lambda | drift | cosine | "
        "rollbacks |\n|---|---|---|---|---|---|---|---|---|---|"
    ]
    for name in SETTINGS:
        rows = results.of(name)
        if rows:
            distances = [row["frechet_distance"] for row in rows]
            chained = "dual" in rows[0]
            own = (
                f"{median(rows, 'dual'):.0f} | {median(rows, 'drift'):.4f} | {median(rows, 'cosine_to_critic'):.4f} | "
                + ", ".join(str(row["rollbacks"]) for row in rows)
                if chained
                else "| | |"
            )
            # The digit classifier's 64 features are not normalized, and the cube in the kernel makes noise of them.
            kernel = f"{median(rows, 'kernel_distance'):.4f}" if "fashion" in results.path.name else ""
            lines.append(
                f"| {name} | {', '.join(f'{d:.1f}' for d in distances)} | {median(rows, 'frechet_distance'):.1f} | "
                f"{kernel} | {median(rows, 'recall'):.2f} | {median(rows, 'coverage'):.2f} | "
                f"{own} |"
            )
    return "\n".join(lines)


def run_folder(output_dir: Path, data_name: str, name: str, seed: int) -> Path:
    return output_dir / data_name / f"{name.replace(', ', '_').replace(' ', '-')}_{seed}"


def main() -> None:
    made = parser(__doc__, list(SETTINGS))
    made.add_argument(
        "--plot", type=picture_file, help="picture of distance against iterations and time, for --fashion_mnist"
    )
    args = made.parse_args()
    if args.plot is not None and args.fashion_mnist is None:
        made.error("--plot needs --fashion_mnist: runs on digits measure nothing while they train.")
    results = open_results(args, "chain")
    if not args.table:
        data = load_data(args)
        print(f"{data.about}; arguments {' '.join(data.arguments)}; {versions()}", flush=True)

        def make(name: str, seed: int) -> dict:
            folder = run_folder(args.output_dir, data.name, name, seed)
            train(data, folder, seed, args.max_train_steps, *SETTINGS[name])
            return trained_row(data, folder)

        arguments = {name: [*data.arguments, *SETTINGS[name]] for name in args.settings}
        results.fill(args.settings, args.seeds, make, args.max_train_steps, arguments)
    print(table(results))
    if args.plot is not None:
        runs = {
            name: [run_folder(args.output_dir, data_name(args), name, row["seed"]) for row in results.of(name)]
            for name in args.settings
        }
        plot_curves({name: folders for name, folders in runs.items() if folders}, args.plot)


if __name__ == "__main__":
    main()
