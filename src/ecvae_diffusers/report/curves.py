# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The curves of a run as one picture, for the demo and for cards."""

from pathlib import Path

from ecvae_diffusers.atomic import replacing


# Panels by their titles, with the names of what they show.
CALIBRATION = {
    "dual variable $\\lambda$": ("dual",),
    "constraint (squared error summed over an image)": ("constraint", "tolerance", "noise_floor"),
    "drift of the chain (RMS per pixel)": ("drift",),
    "energy gap: calibrated samples minus data": ("energy_gap",),
}
# What a run without an energy model may have logged: of an autoencoder, a flow, a posterior that is calibrated alone.
LOSSES = ("reconstruction", "kl", "bits_per_dimension", "posterior_constraint", "posterior_dual")


def plot_curves(records: list[dict], path: Path) -> None:
    """
    Plot the dual variable, the constraint against its tolerance, the drift and the energy gap over the iterations; of
    a run without an energy model its losses, and the posterior's constraint and dual variable if there are these.

    Args:
        records (`list[dict]`): Of `metrics.jsonl`.
        path (`Path`): PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    calibrated = "dual" in records[-1]
    if calibrated:
        records = [
            one | {"energy_gap": one["energy_targets"] - one["energy_real"]} for one in records if "dual" in one
        ]
    steps = [record["step"] for record in records]
    panels = CALIBRATION if calibrated else {name.replace("_", " "): (name,) for name in LOSSES if name in records[-1]}
    rows, columns, size = (2, 2, (10, 6)) if calibrated else (1, len(panels), (5 * len(panels), 3))
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, layout="constrained", squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items()):
        axis.set_title(title)
        for name, style in zip(names, ("-", "--", ":")):
            axis.plot(steps, [record[name] for record in records], style, label=name.replace("_", " "))
        if len(names) > 1:
            axis.legend()
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
