"""A plugin of SGLang, which loads it in each of its processes: torch where it has Triton kernels.

SGLang finds places for the KV of new tokens with two Triton kernels, and Triton cannot run on a
CPU. It has the same in torch for other accelerators, `alloc_extend_naive`.
"""

from collections.abc import Callable
from typing import Any

import torch


class _Launched:
    """A function that is called like a Triton kernel: `kernel[grid](...)`."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._function


def use_torch() -> None:
    from sglang.srt.mem_cache.allocator import paged

    def extend(
        prefix_lens: torch.Tensor,
        seq_lens: torch.Tensor,
        last_loc: torch.Tensor,
        free_pages: torch.Tensor,
        out: torch.Tensor,
        next_power_of_2: int,
        page_size: int,
    ) -> None:
        paged.alloc_extend_naive(
            prefix_lens, seq_lens, last_loc, free_pages, out, page_size, out.device
        )

    def decode(
        seq_lens: torch.Tensor,
        last_loc: torch.Tensor,
        free_pages: torch.Tensor,
        out: torch.Tensor,
        next_power_of_2: int,
        page_size: int,
    ) -> None:
        extend(seq_lens - 1, seq_lens, last_loc, free_pages, out, next_power_of_2, page_size)

    paged.alloc_extend_kernel = _Launched(extend)
    paged.alloc_decode_kernel = _Launched(decode)
