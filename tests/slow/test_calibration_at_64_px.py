"""Calibration stays on at 64 px in colour with default settings. Slow: `make test-slow`."""

import numpy as np
import PIL.Image
from training_runs import metrics, succeed


NUM_IMAGES, SIZE, STEPS = 96, 64, 400


def write_pictures(folder):
    """Discs and squares in colours of their own on gradients: edges, which a plain VAE blurs."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    folder.mkdir(parents=True)
    for i in range(NUM_IMAGES):
        picture = (rng.uniform(0, 255, 3) * (x / SIZE)[..., None] + rng.uniform(0, 128, 3) * (y / SIZE)[..., None]) / 2
        for _ in range(3):
            cx, cy, radius = rng.uniform(8, SIZE - 8), rng.uniform(8, SIZE - 8), rng.uniform(5, 16)
            is_disc = rng.uniform() < 0.5
            distance = np.hypot(x - cx, y - cy) if is_disc else np.maximum(abs(x - cx), abs(y - cy))
            picture[distance < radius] = rng.uniform(0, 255, 3)
        PIL.Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def test_lambda_is_alive_after_400_iterations(tmp_path):
    succeed(
        "--train_data_dir", write_pictures(tmp_path / "pictures"), "--output_dir", tmp_path / "run", "--resolution", SIZE,
        "--latent_channels", 8, "--block_out_channels", 8, 8, 8, 8, "--train_batch_size", 4, "--langevin_steps", 1,
        "--max_train_steps", STEPS, "--save_images_steps", STEPS,
    )  # fmt: skip
    logged = [record for record in metrics(tmp_path / "run") if record["step"] > 200]
    assert sum(record["calibrating"] for record in logged) >= 0.95 * len(logged)
    # It rests at 34. With a tolerance of 0.0074 per entry, as it once was, it is at 7 by now and falls.
    assert logged[-1]["dual"] > 20
