"""Images as 8-bit files hold them, and as networks take them."""

import torch


def center_crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """(..., H, W) -> (..., size, size)."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def to_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> the nearest uint8; what is outside is clipped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
