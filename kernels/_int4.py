"""How 4-bit weights lie in words.

The 128 columns of a chunk lie in 16 words: word j holds in nibble i, which is bits 4 i ... 4 i + 3, column 16 i + j. So
one shift and one mask take a plane of 16 neighbouring columns out of 16 neighbouring words, and every plane lies in one
group. The columns beyond the weight's own are 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK, PLANE, PER_WORD = 128, 16, 8  # columns of a chunk and of a plane; numbers in a word


def pack_int4(q_NK: Tensor) -> Tensor:
    """Packs numbers 0 ... 15, uint8 [N, K], into words, int32 [N, 16 ceil(K / 128)]."""
    n, k = q_NK.shape
    planes = F.pad(q_NK, (0, -k % CHUNK)).view(n, -1, PER_WORD, PLANE)
    bytes_of_words = planes[:, :, 0::2] | planes[:, :, 1::2] << 4  # [N, chunks, 4, 16]: byte b has planes 2 b, 2 b + 1
    return bytes_of_words.transpose(2, 3).contiguous().view(torch.int32).view(n, -1)


def unpack_int4(words_NW: Tensor, num_columns: int) -> Tensor:
    """Returns the numbers of the first columns, uint8 [N, K]."""
    n, num_words = words_NW.shape
    bytes_of_words = words_NW.contiguous().view(torch.uint8).view(n, num_words // PLANE, PLANE, 4).transpose(2, 3)
    planes = torch.stack((bytes_of_words & 15, bytes_of_words >> 4), 3)  # [N, chunks, 4, 2, 16]
    return planes.reshape(n, -1)[:, :num_columns]
