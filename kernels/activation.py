"""BatchNorm and ReLU written out: for a convolution of PyTorch's, against which the fused kernel is measured."""

import triton
import triton.language as tl

from .common import in_units, load_reader, offsets, relu, row_and_column, to_storage


@triton.jit(do_not_specialize=["m"], do_not_specialize_on_alignment=["C", "stride_om", "stride_xm"])
def activation_kernel(
    out_ptr, x_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    m, C, stride_om, stride_xm, eps,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out = relu((x - mean)*gamma/sqrt(var + eps) + beta)``.

    out, x [m, C, feature dtype, rows apart]; mean, var, gamma, beta [C]; UNIT divides C and both strides
    Grid: (row tiles * column tiles), columns fastest.
    """
    tile, column = row_and_column(tl.program_id(0).to(tl.int64), tl.cdiv(C, BLOCK_C))
    first_row, local = tile * BLOCK_M, tl.arange(0, BLOCK_M)
    c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < in_units(C, UNIT)
    mask = (first_row + local < m)[:, None] & c_mask[None, :]
    x_tile = x_ptr + first_row * in_units(stride_xm, UNIT) + offsets(local, c, in_units(stride_xm, UNIT))
    x = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
    mean, scale, beta = load_reader(mean_ptr, var_ptr, gamma_ptr, beta_ptr, c, c_mask, eps)
    out = relu((x - mean[None, :]) * scale[None, :] + beta[None, :])
    out_tile = out_ptr + first_row * in_units(stride_om, UNIT) + offsets(local, c, in_units(stride_om, UNIT))
    tl.store(out_tile, to_storage(out, out_ptr.dtype.element_ty), mask=mask)
