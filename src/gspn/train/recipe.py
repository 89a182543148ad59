"""What training does to its images."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Augmentation:
    """What training does to its images.

    Attributes:
        shift: moves by up to this many pixels in each direction.
        fill: what a shift uncovers: "zero" or "reflect".
        flip: mirrors left and right half of the time.
        crop: takes a random box instead of the centre box (photos).
    """

    shift: int = 0
    fill: str = "reflect"
    flip: bool = False
    crop: bool = False

    def move(self, images, numbers):
        """Shifts and flips a batch, uint8 (B, C, H, W), as `numbers` (B, 3) in [0, 1) say, all images at once."""
        if not (self.shift or self.flip):
            return images
        B, C, H, W = images.shape
        offset = (numbers[:, :2] * (2 * self.shift + 1)).long() - self.shift
        y = torch.arange(H) + offset[:, :1]
        x = torch.arange(W) + offset[:, 1:]
        if self.flip:
            x = torch.where(numbers[:, 2:] < 0.5, x, W - 1 - x)
        inside = ((y >= 0) & (y < H))[:, None, :, None] & ((x >= 0) & (x < W))[:, None, None, :]
        place = _reflect(y, H)[:, :, None] * W + _reflect(x, W)[:, None, :]
        moved = images.reshape(B, C, H * W).gather(2, place.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)
        return moved * inside if self.fill == "zero" else moved


def _reflect(place, length):
    """Folds places beyond 0..length-1 back by mirroring at the borders."""
    last = max(length - 1, 1)
    return (last - (last - place.abs() % (2 * last)).abs()).clamp(max=length - 1)
