"""Patch embedding: pixels to ViT tokens, patches first (see _contract).

    x[i * L + p] = W patch(i, p) + b + position[1 + p]       patches row-major over the tile
    x[I * L + i] = class + position[0]

uint8 tiles are normalised with the ImageNet statistics, (v / 255 - mean) / std in float32, as the official transform
does; floating-point tiles are taken as normalised already.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise_tiles_reference(tiles: Tensor) -> Tensor:
    """uint8 [I, S, S, 3] to float32 [I, 3, S, S]."""
    mean = torch.tensor(IMAGENET_MEAN, device=tiles.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=tiles.device)[:, None, None]
    return (tiles.permute(0, 3, 1, 2).float() / 255 - mean) / std


def patch_embed_reference(
    tiles: Tensor, weight_EK: Tensor, bias_E: Tensor, class_E: Tensor, position_UE: Tensor
) -> Tensor:
    """Rows [I * (L + 1), E] of tiles given as uint8 [I, S, S, 3] or, normalised, as floating point [I, 3, S, S].

    K = 3 * patch * patch in the order (channel, row, column), the memory order of the checkpoint's convolution.
    """
    pixels = normalise_tiles_reference(tiles) if tiles.dtype == torch.uint8 else tiles
    num_tiles, channels, side, _ = pixels.shape
    patch = round((weight_EK.shape[1] // channels) ** 0.5)
    grid = side // patch
    patches = pixels.to(weight_EK.dtype).view(num_tiles, channels, grid, patch, grid, patch)
    patches_ILK = patches.permute(0, 2, 4, 1, 3, 5).reshape(num_tiles, grid * grid, weight_EK.shape[1])
    x_ILE = F.linear(patches_ILK, weight_EK, bias_E) + position_UE[1:]
    return torch.cat((x_ILE.flatten(0, 1), (class_E + position_UE[0]).expand(num_tiles, -1)))
