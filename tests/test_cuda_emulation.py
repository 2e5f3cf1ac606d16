"""The emulation that runs CUDA kernels on the CPU: toy kernels with known answers."""

from __future__ import annotations

import struct

import cuda_emulation
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


def address(array: np.ndarray) -> int:
    return array.ctypes.data


TOTAL = r"""
struct Total { const double* x; double* out; long long n; };

// Each warp sums by shuffles, and thread 0 what the warps found.
extern "C" __global__ void __launch_bounds__(1024) total(const Total call) {
  __shared__ double of_warp[32];
  double sum = 0;
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < call.n; i += gridDim.x * blockDim.x)
    sum += call.x[i];
  for (int step = 16; step; step /= 2) {
    double other = __shfl_down_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 + step < 32 && threadIdx.x + step < blockDim.x) sum += other;
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double all = 0;
    for (int w = 0; w < (blockDim.x + 31) / 32; ++w) all += of_warp[w];
    call.out[blockIdx.x] = all;
  }
}

struct Tree { const int* x; int* out; };

// A tree through dynamic shared memory, with a barrier for each level.
extern "C" __global__ void tree(const Tree call) {
  FL_DYNAMIC_SHARED(memory);
  int* sums = reinterpret_cast<int*>(memory);
  int i = threadIdx.x, n = blockDim.x;
  sums[i] = call.x[blockIdx.x * n + i];
  __syncthreads();
  while (n > 1) {
    int half = (n + 1) / 2;
    if (i + half < n) sums[i] += sums[i + half];
    __syncthreads();
    n = half;
  }
  if (i == 0) call.out[blockIdx.x] = sums[0];
}
"""


@pytest.fixture(scope="module", params=[False, True], ids=["fibers", "threads"])
def totals(request: pytest.FixtureRequest) -> cuda_emulation.Library:
    return cuda_emulation.Library(TOTAL, {"total": "Total", "tree": "Tree"}, threads=request.param)


@given(
    n=st.integers(0, 5000),
    blocks=st.integers(1, 4),
    threads=st.integers(1, 256),
    order=st.sampled_from(cuda_emulation.ORDERS),
)
def test_warps_and_blocks_sum_what_numpy_sums(totals, n, blocks, threads, order):
    x = np.arange(n, dtype=np.float64)
    out = np.zeros(blocks)
    call = struct.pack("PPq", address(x), address(out), n)
    totals.launch("total", (blocks, 1, 1), (threads, 1, 1), 0, call, order=order)
    assert out.sum() == n * (n - 1) / 2


@given(blocks=st.integers(1, 3), threads=st.integers(1, 256), data=st.data())
def test_barriers_order_shared_memory(totals, blocks, threads, data):
    order = data.draw(st.sampled_from(cuda_emulation.ORDERS))
    x = np.arange(blocks * threads, dtype=np.int32).reshape(blocks, threads) ** 2
    out = np.zeros(blocks, np.int32)
    call = struct.pack("PP", address(x), address(out))
    totals.launch("tree", (blocks, 1, 1), (threads, 1, 1), 4 * threads, call, order=order, seed=1)
    np.testing.assert_array_equal(out, x.sum(axis=1))
