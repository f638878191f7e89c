"""The draws of one iteration: the same for one process and for many, whatever came before."""

import torch

from ecvae_diffusers.training.data.transforms import center_crop, crop_at_random
from ecvae_diffusers.training.randomness import ChainNoise, StepNoise


CPU = torch.device("cpu")


def test_shares_of_many_processes_are_the_draws_of_one():
    one = StepNoise(3, 7, 0, 1, CPU)
    four = [StepNoise(3, 7, rank, 4, CPU) for rank in range(4)]
    for draw in ("uniform", "normal"):  # in turn: each draw goes on where the one before ended, on every process
        whole = getattr(one, draw)(8, 2, 3)
        assert torch.equal(whole, torch.cat([getattr(noise, draw)(2, 2, 3) for noise in four]))
    samples = torch.zeros(8, 1, 4, 4)
    chain, shares = ChainNoise(one, samples), [ChainNoise(noise, samples[:2]) for noise in four]
    for timestep in range(3):
        assert torch.equal(chain[timestep], torch.cat([share[timestep] for share in shares]))


def test_draws_depend_on_seed_and_step_alone():
    draws = {key: StepNoise(*key, 0, 1, CPU).normal(2, 500) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}
    for key, values in draws.items():
        assert torch.equal(values, StepNoise(*key, 0, 1, CPU).normal(2, 500))
        for other, others in draws.items():
            if other != key:
                assert torch.corrcoef(torch.stack([values.flatten(), others.flatten()]))[0, 1].abs() < 0.15
    assert abs(draws[0, 0].mean()) < 0.1 and abs(draws[0, 0].std() - 1) < 0.1


def test_random_crops_are_squares_of_the_images_and_a_share_a_process():
    """Each crop is found in its image; two processes crop what one does."""
    images = torch.arange(8 * 3 * 9 * 12).float().view(8, 3, 9, 12)
    crops = crop_at_random(images, 4, StepNoise(0, 3, 0, 1, CPU))
    places = set()
    for image, crop in zip(images, crops):
        first = (image[0] == crop[0, 0, 0]).nonzero()[0].tolist()
        assert torch.equal(image[:, first[0] : first[0] + 4, first[1] : first[1] + 4], crop)
        places.add(tuple(first))
    assert len(places) > 4
    shares = [crop_at_random(images[i * 4 : i * 4 + 4], 4, StepNoise(0, 3, i, 2, CPU)) for i in (0, 1)]
    assert torch.equal(torch.cat(shares), crops)
    assert torch.equal(center_crop(images, 4), images[..., 2:6, 4:8])
    assert torch.equal(crop_at_random(images[..., :9], 9, StepNoise(0, 0, 0, 1, CPU)), images[..., :9])
