#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Calibrate a decoder of audio: `python examples/audio_decoder.py`.

The data are synthetic plucked tones: 0.13 s at 2 kHz, with four partials, an envelope and any pitch of one octave. Prior
samples of a VAE of such waveforms are too quiet, and between two pitches. The energy model sees the logarithm of a waveform's
short-time spectrum, and the chain moves the waveform. The VAE is trained without and with calibration, from the same seed and
on the same batches. Calibration about halves the Frechet distance of prior samples to new tones, over such spectra. The script
takes minutes on one thread.
"""

import argparse
import math
import wave

import torch
import torch.nn as nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from ecvae_diffusers import EnergyCalibrator, LangevinScheduler


RATE, LENGTH, NUM_PARTIALS, WINDOW = 2000, 256, 4, 64
LATENTS, BATCH, NUM_SAMPLES = 16, 32, 5_000


def tones(count: int, seed: int) -> torch.Tensor:
    """Make waveforms (N, 1, 256) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, columns: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, columns, 1, generator=generator)

    time, partial = torch.arange(LENGTH) / RATE, torch.arange(1, NUM_PARTIALS + 1).view(1, -1, 1)
    pitch = 110 * 2 ** uniform(0, 1)
    # In a bright tone, high partials are as loud as low ones. They always decay faster.
    loudness = partial ** -uniform(0.5, 3) * uniform(0.3, 1, NUM_PARTIALS)
    decay = (-time * uniform(5, 40) * partial.sqrt()).exp()
    attack = 1 - (-time / uniform(0.001, 0.01)).exp()
    waves = (loudness * decay * (2 * math.pi * pitch * partial * time).sin()).sum(1, keepdim=True) * attack
    return 0.9 * waves / waves.abs().amax(2, keepdim=True)


def spectra(waveforms: torch.Tensor, hop: int) -> torch.Tensor:
    """Return the log power (N, F) in 33 bands of 31 Hz, every `hop` samples. Power far below that of a full tone is cut off."""
    found = torch.stft(waveforms.squeeze(1), WINDOW, hop, window=torch.hann_window(WINDOW), return_complex=True)
    return 0.5 * (torch.view_as_real(found).square().sum(-1) + 0.01).log().flatten(1)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for two sets of features (N, F)."""
    a, b = a.double(), b.double()
    covariances = a.T.cov(), b.T.cov()
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * roots
    return distance.item()


class AudioVAE(nn.Module):
    """A VAE from waveforms (B, 1, 256) to latents (B, 16) and back."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(LENGTH, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2 * LATENTS),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, LENGTH),
            nn.Unflatten(1, (1, LENGTH)),
        )  # fmt: skip

    def loss(self, real: torch.Tensor) -> torch.Tensor:
        """Return the squared error, summed over a waveform, plus the KL divergence in nats."""
        mean, log_variance = self.encoder(real).chunk(2, dim=1)
        waveforms = self.decoder(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return ((waveforms - real).square().flatten(1).sum(1) + divergence).mean()


class AudioEnergyModel(nn.Sequential):
    """An energy model from waveforms (B, 1, 256) to energies (B, 1), which sees spectra at 9 times."""

    def __init__(self, width: int = 128):
        super().__init__(
            spectral_norm(nn.Linear((WINDOW // 2 + 1) * 9, width)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(width, width)), nn.LeakyReLU(0.2), spectral_norm(nn.Linear(width, 1)),
        )  # fmt: skip

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        return super().forward(spectra(waveforms, hop=32))


def train(data: torch.Tensor, num_steps: int, calibrated: bool, seed: int) -> AudioVAE:
    torch.manual_seed(seed)
    vae, energy_model = AudioVAE(), AudioEnergyModel()
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    energy_optimizer = torch.optim.Adam(energy_model.parameters(), lr=5e-4, betas=(0.0, 0.9))
    # The default suits images. This is about a sixteenth of the root mean square of these waveforms.
    calibrator = EnergyCalibrator(
        energy_model, LangevinScheduler(num_steps=5, drift_step_size=0.2), drift_tolerance=0.02
    )
    for _ in tqdm(range(num_steps), desc="calibrated" if calibrated else "VAE alone"):
        real = data[torch.randint(len(data), (BATCH,))]
        loss = vae.loss(real)
        latents = torch.randn(BATCH, LATENTS)
        if calibrated:
            calibration = calibrator.calibrate(vae.decoder(latents))
            loss = loss + calibration.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if calibrated:
            energy_optimizer.zero_grad()
            calibrator.energy_loss(real, calibration.targets).loss.backward()
            energy_optimizer.step()
            calibrator.dual_step(calibration.constraint)
            calibrator.adapt_drift_step(calibration.constraint)
    return vae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="WAV file to write: samples without calibration, then with it")
    args = parser.parse_args()
    data, others = tones(20_000, seed=1), spectra(tones(NUM_SAMPLES, seed=2), hop=64)
    distances, loudness, heard = [], [], []
    for calibrated in (False, True):
        vae = train(data, args.num_steps, calibrated, args.seed)
        with torch.no_grad():
            samples = vae.decoder(
                torch.randn(NUM_SAMPLES, LATENTS, generator=torch.Generator().manual_seed(args.seed))
            )
        distances.append(frechet_distance(spectra(samples, hop=64), others))
        loudness.append((samples.square().mean() / data.square().mean()).sqrt().item())
        heard.append(samples[:16].flatten())
    floor = frechet_distance(spectra(data[:NUM_SAMPLES], hop=64), others)
    print(f"Frechet distance before {distances[0]:.1f}, after {distances[1]:.1f}; training tones {floor:.1f}")
    print(f"loudness over the data's before {loudness[0]:.2f}, after {loudness[1]:.2f}")
    if args.output is not None:
        with wave.open(args.output, "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes((torch.cat(heard).clamp(-1, 1) * 32767).short().numpy().tobytes())


if __name__ == "__main__":
    main()
