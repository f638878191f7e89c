"""The curves of a run as one picture, for the demo and for cards."""

from pathlib import Path

from ecvae_diffusers.atomic import replacing


# What a run without an energy model may have logged: of an autoencoder, a flow, a posterior that is calibrated alone.
LOSSES = ("reconstruction", "kl", "bits_per_dimension", "posterior_constraint", "posterior_dual")


def plot_curves(records: list[dict], path: Path) -> None:
    """
    The dual variable, the constraint against its tolerance, the drift and the energy gap over the iterations; of a run without
    an energy model its losses, and the posterior's constraint and dual variable where there are these.

    Args:
        records (`list[dict]`): Of `metrics.jsonl`.
        path (`Path`): PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    calibrated = "dual" in records[-1]
    records = [record for record in records if not calibrated or "dual" in record]
    steps = [record["step"] for record in records]

    def values(name: str) -> list[float]:
        return [record[name] for record in records]

    if not calibrated:
        names = [name for name in LOSSES if name in records[-1]]
        figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3), layout="constrained", squeeze=False)
        for axis, name in zip(axes.flat, names):
            axis.plot(steps, values(name))
            axis.set(title=name.replace("_", " "), xlabel="iteration")
    else:
        figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
        axes[0, 0].plot(steps, values("dual"))
        axes[0, 0].set_title("dual variable $\\lambda$")
        axes[0, 1].plot(steps, values("constraint"), label="constraint")
        axes[0, 1].plot(steps, values("tolerance"), "--", label="tolerance $\\epsilon$")
        axes[0, 1].plot(steps, values("noise_floor"), ":", label="noise floor")
        axes[0, 1].set_title("constraint (squared error summed over an image)")
        axes[0, 1].legend()
        axes[1, 0].plot(steps, values("drift"))
        axes[1, 0].set_title("drift of the chain (RMS a pixel)")
        axes[1, 1].plot(steps, [fake - real for fake, real in zip(values("energy_targets"), values("energy_real"))])
        axes[1, 1].set_title("energy gap: calibrated samples minus data")
        for axis in axes[1]:
            axis.set_xlabel("iteration")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
