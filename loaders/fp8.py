"""Block-quantised fp8 weights (the official DeepSeek-V3 form) back to ordinary ones.

`W[i, j] = fp8[i, j] * scale_inv[i // block_rows, j // block_cols]`: despite its name the scale multiplies; blocks at
the edges are cropped (DeepSeek-V3 README_WEIGHTS and inference/fp8_cast_bf16.py).
"""

import torch

SCALE_SUFFIX = "_scale_inv"
_STRIP_ELEMENTS = 1 << 20  # bounds the float32 temporary to 4 MiB, or one row of blocks


def num_blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """The shape of the scale grid of a 2-D weight of `shape`."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def scale_to_float32(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32; float8_e8m0fnu holds an exponent (value 2^(byte - 127)), never a plain number."""
    if scale.dtype is torch.float8_e8m0fnu:
        exponents = scale.view(torch.uint8).to(torch.int32)
        values = torch.ldexp(torch.ones(scale.shape, dtype=torch.float64), exponents - 127).to(torch.float32)
        return values.masked_fill(exponents == 255, float("nan"))
    return scale.to(torch.float32)


class Dequantiser:
    """Dequantises weights one after another in one reused float32 strip: a new one each time fragments the heap."""

    def __init__(self, block: tuple[int, int]) -> None:
        """`block` is (rows, columns) per scale."""
        self._block = block
        self._strip = torch.empty(0)

    def dequantise(self, weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """fp8 `weight` [out, in] and `scale_inv` [ceil(out/rows), ceil(in/columns)] -> [out, in] in `dtype`.

        The product is taken in float32 and rounded once.
        """
        (num_rows, num_cols), (block_rows, block_cols) = weight.shape, self._block
        scale = scale_to_float32(scale_inv).repeat_interleave(block_cols, dim=1)[:, :num_cols]
        result = torch.empty(num_rows, num_cols, dtype=dtype)
        rows_per_strip = block_rows * max(1, _STRIP_ELEMENTS // max(1, block_rows * num_cols))
        for first in range(0, num_rows, rows_per_strip):
            rows = slice(first, min(num_rows, first + rows_per_strip))
            strip = self._temporary(rows.stop - rows.start, num_cols).copy_(weight[rows])
            for row in range(0, strip.shape[0], block_rows):
                strip[row : row + block_rows] *= scale[(first + row) // block_rows]
            result[rows] = strip
        return result

    def _temporary(self, num_rows: int, num_cols: int) -> torch.Tensor:
        num_elements = num_rows * num_cols
        if self._strip.numel() < num_elements:
            self._strip = torch.empty(max(num_elements, _STRIP_ELEMENTS))
        return self._strip[:num_elements].view(num_rows, num_cols)
