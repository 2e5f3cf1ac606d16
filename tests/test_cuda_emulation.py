"""The emulation of CUDA kernels on the CPU, by toy kernels with known answers."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import cuda_emulation
import numpy as np
import pytest
from cuda_emulation import CompileError, LaunchError, Library
from hypothesis import given, settings
from hypothesis import strategies as st
from support import _absent

if shutil.which(cuda_emulation.compiler()[0]) is None:
    _absent("c++", FileNotFoundError(cuda_emulation.compiler()[0]))

# Each example starts hundreds of threads if they are threads of the operating system.
few = settings(max_examples=25)
orders = st.sampled_from(cuda_emulation.ORDERS)


def pack(*arguments: np.ndarray | int) -> bytes:
    """A struct of pointers and 64-bit integers."""
    return b"".join(
        struct.pack("P", a.ctypes.data) if isinstance(a, np.ndarray) else struct.pack("q", a)
        for a in arguments
    )


@pytest.fixture(scope="module", params=[False, True], ids=["fibers", "threads"])
def threads(request: pytest.FixtureRequest) -> bool:
    """Fibers or OS threads, for tests that both must pass."""
    return request.param


# --- Asynchronous copies -----------------------------------------------------------------------

COPIES = r"""
struct Copies { const char* x; float* out; long long latest; long long shift; };

// Two groups of copies, of which all but the latest so many are waited for.
extern "C" __global__ void copies(const Copies call) {
  __shared__ __align__(16) char to[2][128];
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x < 8)
      fl_emulation::copy_later(to[i] + threadIdx.x * 16, call.x + i * 128 + threadIdx.x * 16 +
                               call.shift, 16);
    fl_emulation::commit_copies();
  }
  fl_emulation::wait_for_copies(int(call.latest));
  __syncthreads();
  for (int i = 0; i < 2; ++i)
    call.out[i * 32 + threadIdx.x] = reinterpret_cast<float*>(to[i])[threadIdx.x];
}
"""


@pytest.mark.parametrize("latest", [0, 1, 2])
def test_copies_arrive_when_they_are_waited_for(threads: bool, latest: int) -> None:
    library = Library(COPIES, {"copies": "Copies"}, threads=threads)
    x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    library.launch("copies", (1, 1, 1), (32, 1, 1), 0, pack(x, out, latest, 0))
    arrived = 64 - 32 * latest
    np.testing.assert_array_equal(out[:arrived], x[:arrived])
    assert np.isnan(out[arrived:]).all()
    with pytest.raises(LaunchError, match="asynchronous copy that is not aligned"):
        library.launch("copies", (1, 1, 1), (32, 1, 1), 0, pack(x, out, latest, 4))


# --- Sums of blocks -------------------------------------------------------------------------------

SUMS = r"""
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


@pytest.fixture(scope="module")
def sums(threads: bool) -> Library:
    return Library(SUMS, {"total": "Total", "tree": "Tree"}, threads=threads)


@few
@given(n=st.integers(0, 5000), blocks=st.integers(1, 4), size=st.integers(1, 256), order=orders)
def test_shuffles_and_blocks_sum_what_numpy_sums(sums, n, blocks, size, order):
    x = np.arange(n, dtype=np.float64)
    out = np.zeros(blocks)
    sums.launch("total", (blocks, 1, 1), (size, 1, 1), 0, pack(x, out, n), order=order)
    assert out.sum() == n * (n - 1) / 2


@few
@given(blocks=st.integers(1, 3), size=st.integers(1, 256), order=orders, seed=st.integers(0, 99))
def test_barriers_order_shared_memory(sums, blocks, size, order, seed):
    x = np.arange(blocks * size, dtype=np.int32).reshape(blocks, size) ** 2
    out = np.zeros(blocks, np.int32)
    grid, block = (blocks, 1, 1), (size, 1, 1)
    sums.launch("tree", grid, block, 4 * size, pack(x, out), order=order, seed=seed)
    np.testing.assert_array_equal(out, x.sum(axis=1))


@pytest.mark.parametrize("size", [1000, 1024])
def test_the_largest_blocks(sums, size):
    x = np.arange(size, dtype=np.int32)
    out = np.zeros(1, np.int32)
    sums.launch("tree", (1, 1, 1), (size, 1, 1), 4 * size, pack(x, out))
    assert out[0] == x.sum()


# --- Indices, and the order of blocks and threads -------------------------------------------------

INDICES = r"""
struct Call { int* out; int* next; };

// Of every thread what it is, and which place it took.
extern "C" __global__ void indices(const Call call) {
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  int* out = call.out + 7 * i;
  out[0] = blockIdx.x, out[1] = blockIdx.y, out[2] = blockIdx.z;
  out[3] = threadIdx.x, out[4] = threadIdx.y, out[5] = threadIdx.z;
  out[6] = atomicAdd(call.next, 1);
}
"""


@pytest.fixture(scope="module")
def indices(threads: bool) -> Library:
    return Library(INDICES, {"indices": "Call"}, threads=threads)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def run_indices(library, grid, block, order="forward", seed=0):
    # C order with x last, as in kernels.
    shape = (*grid[::-1], *block[::-1])
    out = np.full((*shape, 7), -1, np.int32)
    arguments = pack(out, np.zeros(1, np.int32))
    library.launch("indices", grid, block, 0, arguments, order=order, seed=seed)
    return out.reshape(-1, 7), np.indices(shape).reshape(6, -1)[[2, 1, 0, 5, 4, 3]].T


@few
@given(grid=sizes, block=sizes, order=orders)
def test_every_thread_of_every_block_runs_once(indices, grid, block, order):
    out, expected = run_indices(indices, grid, block, order)
    np.testing.assert_array_equal(out[:, :6], expected)
    assert sorted(out[:, 6]) == list(range(len(out)))


def test_orders_are_what_their_names_say():
    library = Library(INDICES, {"indices": "Call"})
    grid, block = (3, 2, 1), (40, 1, 1)
    count = np.arange(240)
    places = {
        (order, seed): run_indices(library, grid, block, order, seed)[0][:, 6]
        for order in cuda_emulation.ORDERS
        for seed in (0, 1)
    }
    np.testing.assert_array_equal(places["forward", 0], count)
    np.testing.assert_array_equal(places["reverse", 0], count[::-1])
    np.testing.assert_array_equal(places["forward", 0], places["forward", 1])
    a, b = places["random", 0], places["random", 1]
    assert not np.array_equal(a, b)
    for place in (a, b):
        # Blocks run one after another; neither blocks nor threads run in numerical order.
        blocks = place.reshape(6, 40) // 40
        assert (blocks == blocks[:, :1]).all()
        assert not np.array_equal(blocks[:, 0], range(6))
        assert not np.array_equal(place[:40] % 40, range(40))


# --- Warps ----------------------------------------------------------------------------------------

SHUFFLES = r"""
template <class T> struct Call { const T* x; T* out; const int* by; long long kind, width; };

template <class T> __global__ void shuffle(const Call<T> call) {
  unsigned all = 0xffffffffu;
  int i = threadIdx.x;
  T x = call.x[i], got;
  if (call.kind == 0) got = __shfl_sync(all, x, call.by[i], call.width);
  if (call.kind == 1) got = __shfl_up_sync(all, x, call.by[0], call.width);
  if (call.kind == 2) got = __shfl_down_sync(all, x, call.by[0], call.width);
  if (call.kind == 3) got = __shfl_xor_sync(all, x, call.by[0], call.width);
  call.out[i] = got;
}
"""
TYPES = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
}


@pytest.fixture(scope="module")
def shuffles(threads: bool) -> Library:
    kernels = {f"shuffle<{name}>": f"Call<{name}>" for name in TYPES}
    return Library(SHUFFLES, kernels, threads=threads)


@given(
    name=st.sampled_from(sorted(TYPES)),
    kind=st.integers(0, 3),
    width=st.sampled_from([1, 2, 4, 8, 16, 32]),
    size=st.integers(1, 70),
    order=orders,
    data=st.data(),
)
def test_shuffles_read_the_lane_that_cuda_names(shuffles, name, kind, width, size, order, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    x = np.frombuffer(np.random.default_rng(seed).bytes(8 * size), np.uint64)
    x = x.astype(TYPES[name])
    by = data.draw(st.lists(st.integers(0, 40), min_size=size, max_size=size))
    by = np.array(by, np.int32)
    out = np.zeros_like(x)
    arguments = pack(x, out, by, kind, width)
    shuffles.launch(f"shuffle<{name}>", (1, 1, 1), (size, 1, 1), 0, arguments, order=order)
    for i in range(size):
        lane, step = i % 32, int(by[0])
        first = lane // width * width
        source = lane
        if kind == 0:
            source = first + by[i] % width
        elif kind == 1 and lane - step >= first:
            source = lane - step
        elif kind == 2 and lane + step < first + width:
            source = lane + step
        elif kind == 3 and lane ^ step < first + width:
            source = lane ^ step
        other = i - lane + source
        if other < size:
            assert out[i] == x[other]
        else:  # an absent lane
            assert out[i : i + 1].tobytes() == b"\xff" * x.itemsize


VOTES = r"""
struct Call { const int* x; unsigned* out; long long mask; };
extern "C" __global__ void votes(const Call call) {
  int i = threadIdx.x;
  unsigned mask = (unsigned)call.mask;
  if (!(mask >> (i % 32) & 1)) return;
  int x = call.x[i];
  unsigned* out = call.out + 4 * i;
  out[0] = __ballot_sync(mask, x > 1);
  out[1] = __any_sync(mask, x > 1);
  out[2] = __all_sync(mask, x > 1);
  out[3] = __match_any_sync(mask, x);
}
extern "C" __global__ void barriers(const Call call) {
  int i = threadIdx.x, x = call.x[i];
  unsigned* out = call.out + 4 * i;
  out[0] = __syncthreads_count(x);
  out[1] = __syncthreads_or(x);
  out[2] = __syncthreads_and(x);
  out[3] = __popc(__activemask());
}
"""


@pytest.fixture(scope="module")
def votes(threads: bool) -> Library:
    return Library(VOTES, {"votes": "Call", "barriers": "Call"}, threads=threads)


@few
@given(
    x=st.lists(st.integers(0, 3), min_size=1, max_size=70),
    mask=st.integers(1, 2**32 - 1) | st.just(2**32 - 1),
    order=orders,
)
def test_votes(votes, x, mask, order):
    values = np.array(x, np.int32)
    out = np.zeros((len(x), 4), np.uint32)
    votes.launch("votes", (1, 1, 1), (len(x), 1, 1), 0, pack(values, out, mask), order=order)

    def bits(lanes):
        return sum(1 << i % 32 for i in lanes)

    for i in range(len(x)):
        if not mask >> i % 32 & 1:
            assert not out[i].any()
            continue
        warp = range(i // 32 * 32, min(len(x), i // 32 * 32 + 32))
        group = [j for j in warp if mask >> j % 32 & 1]
        yes = [j for j in group if x[j] > 1]
        same = [j for j in group if x[j] == x[i]]
        assert list(out[i]) == [bits(yes), bool(yes), yes == group, bits(same)]


@few
@given(x=st.lists(st.integers(0, 3), min_size=1, max_size=70), order=orders)
def test_barriers_that_count(votes, x, order):
    values = np.array(x, np.int32)
    out = np.zeros((len(x), 4), np.uint32)
    votes.launch("barriers", (1, 1, 1), (len(x), 1, 1), 0, pack(values, out, 0), order=order)
    for i in range(len(x)):
        lanes = min(32, len(x) - i // 32 * 32)
        assert list(out[i]) == [np.count_nonzero(x), any(x), all(x), lanes]


GROUPS = r"""
struct Call { int* out; };
// The halves of a warp go different ways, and meet among themselves, unequally often.
extern "C" __global__ void groups(const Call call) {
  int lane = threadIdx.x, x = lane;
  if (lane < 16) {
    for (int step = 8; step; step /= 2) x += __shfl_xor_sync(0x0000ffffu, x, step);
  } else {
    x = __shfl_sync(0xffff0000u, x, 31);
    __syncwarp(0xffff0000u);
    x += __popc(__activemask());
  }
  call.out[lane] = x + __shfl_sync(0xffffffffu, x, 0);
}
"""


@pytest.mark.parametrize("order", cuda_emulation.ORDERS)
def test_lanes_with_different_masks_meet_among_themselves(threads, order):
    library = Library(GROUPS, {"groups": "Call"}, threads=threads)
    out = np.zeros(32, np.int32)
    library.launch("groups", (1, 1, 1), (32, 1, 1), 0, pack(out), order=order)
    assert out.tolist() == [240] * 16 + [31 + 16 + 120] * 16


# --- Memory ---------------------------------------------------------------------------------------

ADDRESSES = r"""
struct Call { char* memory; long long load, store; };
struct __align__(16) Four { float x[4]; };

template <class T> __device__ void copy(const Call& call) {
  char* at = call.memory + 16 * threadIdx.x;
  *reinterpret_cast<T*>(at + call.store) = *reinterpret_cast<const T*>(at + call.load);
}
extern "C" __global__ void bytes(const Call call) { copy<char>(call); }
extern "C" __global__ void shorts(const Call call) { copy<short>(call); }
extern "C" __global__ void doubles(const Call call) { copy<double>(call); }
extern "C" __global__ void vectors(const Call call) { copy<Four>(call); }
"""


@pytest.mark.parametrize(
    ("kernel", "size"), [("bytes", 1), ("shorts", 2), ("doubles", 8), ("vectors", 16)]
)
def test_misaligned_accesses_are_errors(threads: bool, kernel: str, size: int) -> None:
    names = dict.fromkeys(["bytes", "shorts", "doubles", "vectors"], "Call")
    library = Library(ADDRESSES, names, threads=threads)
    memory = np.zeros(16 * 42, np.uint8)
    start = memory.ctypes.data + -memory.ctypes.data % 16
    library.launch(kernel, (1, 1, 1), (40, 1, 1), 0, pack(start, size, 0))
    for load, store in ((1, 0), (0, size - 1), (size // 2, 0)) if size > 1 else ():
        with pytest.raises(
            LaunchError,
            match=rf"'{kernel}', block .*, thread .*: misaligned address 0x\w+ of .*, expected a "
            rf"multiple of {size} \(kernels.cu:\d+\)",
        ):
            library.launch(kernel, (1, 1, 1), (40, 1, 1), 0, pack(start, load, store))


MEMORY = r"""
struct Call { double* out; long long write; };

template <class T> __device__ T of_template(T* out, bool write) {
  __shared__ T kept[5];
  T found = kept[threadIdx.x];
  if (write) kept[threadIdx.x] = 7;
  return found;
}
extern "C" __global__ void unwritten(const Call call) {
  __shared__ __align__(16) double kept[5];
  FL_DYNAMIC_SHARED(memory);
  double* dynamic = reinterpret_cast<double*>(memory);
  double* out = call.out + 3 * (5 * blockIdx.x + threadIdx.x);
  out[0] = kept[threadIdx.x];
  out[1] = of_template(call.out, call.write);
  out[2] = dynamic[threadIdx.x];
  if (call.write) kept[threadIdx.x] = dynamic[threadIdx.x] = 7;
}
extern "C" __global__ void beyond(const Call call) {
  FL_DYNAMIC_SHARED(memory);
  memory[threadIdx.x] = 1;
}
extern "C" __global__ void aligned(const Call call) {
  FL_DYNAMIC_SHARED(memory);
  *call.out = double(reinterpret_cast<size_t>(memory) % 16);
}
"""


@pytest.fixture(scope="module")
def memory(threads: bool) -> Library:
    kernels = dict.fromkeys(["unwritten", "beyond", "aligned"], "Call")
    return Library(MEMORY, kernels, threads=threads)


@pytest.mark.parametrize("write", [0, 1])
def test_shared_memory_that_a_block_did_not_write_is_nan(memory, write):
    for _ in range(2):  # in the second launch too
        out = np.zeros((3, 5, 3))
        memory.launch("unwritten", (3, 1, 1), (5, 1, 1), 40, pack(out, write))
        assert np.isnan(out).all()


def test_writing_beyond_dynamic_shared_memory_is_an_error(memory):
    out = np.zeros(1)
    memory.launch("beyond", (1, 1, 1), (33, 1, 1), 33, pack(out, 0))
    with pytest.raises(LaunchError, match=r"'beyond', block \(0, 0, 0\): wrote beyond its 32 by"):
        memory.launch("beyond", (1, 1, 1), (33, 1, 1), 32, pack(out, 0))


@given(size=st.integers(1, 100))
def test_dynamic_shared_memory_is_aligned(memory, size):
    out = np.ones(1)
    memory.launch("aligned", (1, 1, 1), (1, 1, 1), size, pack(out, 0))
    assert out[0] == 0


def test_two_libraries_share_nothing():
    # Equal names of different sizes, which a loader might merge.
    source = r"""
    struct Call { int* out; };
    template <class T> __global__ void kernel(const Call call) {
      __shared__ T kept[SIZE];
      for (int i = 0; i < SIZE; ++i) kept[i] = SIZE;
      __syncthreads();
      for (int i = 0; i < SIZE; ++i) call.out[i] = kept[i];
    }
    """
    libraries = {
        size: Library(source.replace("SIZE", str(size)), {"kernel<int>": "Call"})
        for size in (3, 3000)
    }
    for size, library in libraries.items():
        out = np.zeros(size, np.int32)
        library.launch("kernel<int>", (1, 1, 1), (32, 1, 1), 0, pack(out))
        assert (out == size).all()


ATOMIC = ("int", "unsigned", "unsigned long long")
ATOMICS = r"""
template <class T> struct Call { const T* x; T* out; long long bins; };
template <class T> __global__ void atomics(const Call<T> call) {
  T x = call.x[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(&call.out[0], x);
  atomicMax(&call.out[1], x);
  atomicMin(&call.out[2], x);
  atomicOr(&call.out[3], x);
  atomicExch(&call.out[4], x);
  T old = call.out[5], seen;
  do {
    seen = old;
    old = atomicCAS(&call.out[5], seen, T(seen + 1));
  } while (old != seen);
}
"""


@pytest.fixture(scope="module")
def atomics(threads: bool) -> Library:
    kernels = {f"atomics<{name}>": f"Call<{name}>" for name in ATOMIC}
    return Library(ATOMICS, kernels, threads=threads)


@pytest.mark.parametrize("name", ATOMIC)
def test_atomics(atomics, name):
    dtype = TYPES[name]
    x = np.random.default_rng(0).integers(1, 2**16, 300).astype(dtype)
    if dtype == np.int32:
        x[::2] *= -1
    out = np.array([0, 0, 2**31 - 1, 0, 0, 0], dtype)
    atomics.launch(f"atomics<{name}>", (3, 1, 1), (100, 1, 1), 0, pack(x, out, 0))
    union = int(np.bitwise_or.reduce(x))
    assert out[:4].tolist() == [x.sum(dtype=dtype), max(0, x.max()), x.min(), union]
    assert out[4] in x
    assert out[5] == 300


@pytest.mark.parametrize("name", ["float", "double"])
def test_atomics_of_floating_point_numbers_do_not_compile(name):
    source = f"struct Call {{ {name}* x; }};\n__global__ void add(const Call call) {{\nATOMIC;\n}}"
    for atomic in ("atomicAdd(call.x, 1)", "atomicMax(call.x, 1)", "atomicExch(call.x, 1)"):
        with pytest.raises(CompileError, match=r"kernels.cu:3.*no matching function"):
            Library(source.replace("ATOMIC", atomic), {"add": "Call"})


# --- Functions ------------------------------------------------------------------------------------

MATHS = r"""
template <class T> struct Call { const T* x; T* out; };
template <class T> __global__ void maths(const Call<T> call) {
  T x = call.x[threadIdx.x];
  T* out = call.out + 18 * threadIdx.x;
#define PUT(y)                                                  \
  static_assert(std::is_same<decltype(y), T>::value, "of " #y); \
  *out++ = y;
  PUT(exp(x)) PUT(log(x)) PUT(log1p(x)) PUT(expm1(x)) PUT(pow(x, x)) PUT(sqrt(x)) PUT(rsqrt(x))
  PUT(fabs(-x)) PUT(fmin(x, T(1))) PUT(fmax(x, T(1))) PUT(floor(x)) PUT(fma(x, x, T(1)))
  PUT(min(x, T(1))) PUT(max(x, T(1))) PUT(tanh(x)) PUT(cbrt(x)) PUT(__ldg(call.x))
  T stored;
  __stcs(&stored, __ldcs(call.x + threadIdx.x));
  *out++ = stored;
}
"""


@pytest.mark.parametrize("name", ["float", "double"])
def test_functions_compute_in_the_type_of_their_arguments(name):
    kernels = {f"maths<{name}>": f"Call<{name}>" for name in ("float", "double")}
    x = np.array([0.3, 1, 2.5, 7], TYPES[name])
    out = np.zeros((4, 18), x.dtype)
    Library(MATHS, kernels).launch(f"maths<{name}>", (1, 1, 1), (4, 1, 1), 0, pack(x, out))
    w = x.astype(np.float64)
    low, high = np.minimum(w, 1), np.maximum(w, 1)
    expected = [np.exp(w), np.log(w), np.log1p(w), np.expm1(w), w**w, np.sqrt(w), w**-0.5, w]
    expected += [low, high, np.floor(w), w * w + 1, low, high, np.tanh(w), np.cbrt(w)]
    expected += [np.full(4, w[0]), w]
    tolerance = 4 * np.finfo(x.dtype).eps
    np.testing.assert_allclose(out, np.stack(expected, axis=1), rtol=tolerance)


BITS = r"""
struct Call { const unsigned* x; int* out; };
extern "C" __global__ void bits(const Call call) {
  unsigned x = call.x[threadIdx.x];
  long long wide = (long long)((unsigned long long)x << 20);
  int* out = call.out + 12 * threadIdx.x;
  *out++ = __ffs(x), *out++ = __ffsll(wide), *out++ = __popc(x), *out++ = __clz(x);
  *out++ = __float_as_uint(__uint_as_float(x)) == x;
  *out++ = __float_as_int(__int_as_float(int(x))) == int(x);
  *out++ = __double_as_longlong(__longlong_as_double(wide)) == wide;
  *out++ = int(__uint_as_float(0x3fc00000u) * 2), *out++ = int(__longlong_as_double(1ll << 62));
  *out++ = isnan(__int_as_float(-1)), *out++ = isinf(__uint_as_float(0x7f800000u));
  *out++ = min(3, int(x % 7)) * 10 + max(3u, x % 7u);
}
"""


def test_functions_of_bits():
    x = np.array([0, 1, 2, 12, 0x80000000, 0xFFFFFFFF, 0x3FC00000], np.uint32)
    out = np.zeros((len(x), 12), np.int32)
    Library(BITS, {"bits": "Call"}).launch("bits", (1, 1, 1), (len(x), 1, 1), 0, pack(x, out))
    for value, row in zip(x.tolist(), out.tolist(), strict=True):
        lowest = (value & -value).bit_length()
        assert row[:4] == [
            lowest,
            lowest + 20 if value else 0,
            bin(value).count("1"),
            32 - value.bit_length(),
        ]
        assert row[4:] == [1, 1, 1, 3, 2, 1, 1, min(3, value % 7) * 10 + max(3, value % 7)]


# --- Divergent barriers ---------------------------------------------------------------------------

MISUSE = {
    "returned": (
        "if (i >= 40) return; __syncthreads();",
        r"thread \((\d+), 0, 0\) waits at __syncthreads \(kernels.cu:\d+\), where thread "
        r"\((4\d), 0, 0\) never comes: it returned \(threads that wait: 40, that returned: 5\)",
    ),
    "one branch": (
        "if (i < 32) __syncthreads(); else __syncwarp(0xffffffffu); __syncwarp();",
        r"waits at __sync.*where thread .* never comes: it (waits at|returned)",
    ),
    "two barriers": (
        "if (i == 3) {\n __syncthreads();\n } else {\n __syncthreads();\n }",
        r"waits at __syncthreads \(kernels.cu:\d+\), but thread \(3, 0, 0\) waits at __syncthreads",
    ),
    "two kinds of barrier": (
        "if (i == 3) __syncthreads(); else __syncthreads_or(1);",
        r"waits at __syncthreads_or .*, but thread \(3, 0, 0\) waits at __syncthreads ",
    ),
    "full mask": (
        "if (i != 7) __shfl_sync(0xffffffffu, i, 0);",
        r"waits at __shfl_sync with mask 0xffffffff .*where thread \(7, 0, 0\) never comes: it ret",
    ),
    "two kinds of shuffle": (
        "if (i % 2) __shfl_sync(0xffffffffu, i, 0); else __shfl_xor_sync(0xffffffffu, i, 1);",
        r"waits at __shfl_(xor_)?sync with mask .* waits at __shfl_(xor_)?sync with mask",
    ),
    "barrier and shuffle": (
        "if (i < 16) __syncthreads(); else __ballot_sync(0xffffffffu, 1);",
        r"never comes: it waits at",
    ),
    "not in the mask": (
        "__shfl_sync(0x0000fffeu, i, 0);",
        r"thread \(\d+, 0, 0\): lane (0|1[6-9]|2\d|3\d) is not in the mask 0xfffe of its __shfl_",
    ),
    "width": (
        "__shfl_sync(0xffffffffu, i, 0, 12);",
        "__shfl_sync: width is 12; expected a power of two up to 32",
    ),
    "trap": ("if (i == 9) __trap();", r"thread \(9, 0, 0\): __trap \(kernels.cu:\d+\)"),
    "assert": ("assert(i != 9);", r"thread \(9, 0, 0\): assertion failed: i != 9 "),
}


@pytest.fixture(scope="module")
def misuse(threads: bool) -> Library:
    source = "struct Call { int* out; };\n"
    for number, (code, _) in enumerate(MISUSE.values()):
        source += (
            f'extern "C" __global__ void misuse_{number}(const Call call) {{\n'
            f"  int i = threadIdx.x;\n  {code}\n}}\n"
        )
    source += 'extern "C" __global__ void good(const Call call) {\n'
    source += "  call.out[threadIdx.x] = __syncthreads_count(threadIdx.x % 3 == 0);\n}\n"
    kernels = {f"misuse_{number}": "Call" for number in range(len(MISUSE))}
    return Library(source, {**kernels, "good": "Call"}, threads=threads)


@pytest.mark.parametrize("name", MISUSE)
def test_threads_that_do_not_meet_are_an_error_and_no_hang(misuse, name):
    kernel = f"misuse_{list(MISUSE).index(name)}"
    for order in cuda_emulation.ORDERS:
        out = np.zeros(45, np.int32)
        with pytest.raises(LaunchError, match=MISUSE[name][1]) as raised:
            misuse.launch(kernel, (2, 1, 1), (45, 1, 1), 0, pack(out), order=order)
        block = r"\(1, 0, 0\)" if order == "reverse" else r"\([01], 0, 0\)"
        raised.match(rf"^kernel '{kernel}', block {block}")
        # The next launch is not affected.
        misuse.launch("good", (1, 1, 1), (45, 1, 1), 0, pack(out), order=order)
        assert (out == 15).all()


# --- Building and launching -----------------------------------------------------------------------


def test_bad_launches_name_the_argument(sums):
    good = pack(np.zeros(1), np.zeros(1), 0)
    for arguments, message in [
        (("sum", (1, 1, 1), (1, 1, 1), 0, good), "kernel: got 'sum'; expected one of"),
        (("total", (0, 1, 1), (1, 1, 1), 0, good), r"grid: got \(0, 1, 1\); expected sizes from 1"),
        (("total", (1, 65536, 1), (1, 1, 1), 0, good), "grid: got"),
        (("total", (1, 1, 1), (1, 1, 65), 0, good), "block: got"),
        (("total", (1, 1, 1), (512, 3, 1), 0, good), "block: got .* expected 1024 threads at most"),
        (("total", (1, 1, 1), (1, 1, 1), -1, good), "shared_bytes: got -1; expected 0"),
        (("total", (1, 1, 1), (1, 1, 1), 0, good[1:]), "arguments: got 23 bytes; expected the 24"),
    ]:
        with pytest.raises(ValueError, match=message):
            sums.launch(*arguments)
    with pytest.raises(ValueError, match="order: got 'backward'; expected one of"):
        sums.launch("total", (1, 1, 1), (1, 1, 1), 0, good, order="backward")


def test_what_does_not_compile_says_where():
    source = "struct Call { int* out; };\n__global__ void k(const Call call) {\n  nothing();\n}\n"
    with pytest.raises(CompileError, match=r"kernels\.cu:3:.*nothing"):
        Library(source, {"k": "Call"})


def test_a_library_is_compiled_once_until_a_header_changes(tmp_path: Path, monkeypatch):
    header = tmp_path / "number.h"
    source = (
        '#include "number.h"\nstruct Call { int* out; };\n'
        "__global__ void k(const Call call) { *call.out = NUMBER; }\n"
    )
    # An empty cache folder.
    monkeypatch.setattr(cuda_emulation.tempfile, "tempdir", str(tmp_path))
    compilations = []
    compile_ = cuda_emulation._compile
    monkeypatch.setattr(
        cuda_emulation, "_compile", lambda *args: (compilations.append(args), compile_(*args))
    )
    counts = []
    for number in (1, 1, 2):
        header.write_text(f"#define NUMBER {number}\n")
        library = Library(source, {"k": "Call"}, include=[tmp_path])
        out = np.zeros(1, np.int32)
        library.launch("k", (1, 1, 1), (1, 1, 1), 0, pack(out))
        assert out[0] == number
        counts.append(len(compilations))
    assert counts[0] > 0
    assert counts[1] == counts[0] < counts[2]


# --- Sanitizers -----------------------------------------------------------------------------------

# Bodies of kernels, their number of threads, and the sanitizer's report. `s` is a dynamic shared
# array of one integer per thread. Kernels without a report reverse 0 … n − 1.
REVERSED = "call.out[i] = s[n - 1 - i];"
ADDRESS = {
    "proper": (
        96,
        """
        __shared__ int kept[96];
        int local[8];
        for (int k = 0; k < 8; ++k) local[k] = __shfl_xor_sync(0xffffffffu, i + k, 1);
        kept[i] = local[0] ^ 1;
        __syncthreads();
        call.out[i] = kept[n - 1 - i];
        """,
        "",
    ),
    "write": (96, "s[i + 1] = i;", "heap-buffer-overflow"),
    "read": (96, "call.out[i] = s[i + 1];", "heap-buffer-overflow"),
    "static": (96, "__shared__ int kept[95]; int* k = kept; k[i] = i;", "global-buffer-overflow"),
    "local": (
        96,
        "volatile int x[4], *p = x; for (int k = 0; k < n; ++k) p[k] = 1;",
        "stack-buffer-overflow",
    ),
}
UNDEFINED = {
    "proper": ADDRESS["proper"],
    "misaligned": (96, "call.out[i] = *(int*)(memory + i);", "misaligned address"),
    "index": (96, "int x[4]; for (int k = 0; k < n; ++k) x[k] = i;", "index 4 out of bounds"),
}
THREAD = {
    "barrier": (96, "s[i] = i; __syncthreads();" + REVERSED, ""),
    "barrier that votes": (96, "s[i] = i; __syncthreads_or(i);" + REVERSED, ""),
    "barrier of a warp": (32, "s[i] = i; __syncwarp();" + REVERSED, ""),
    "two halves": (
        96,
        """
        __shared__ int half[2][96];
        int x = i;
        for (int k = 0; k < 9; ++k) {
          half[k % 2][i] = x;
          __syncthreads();
          x = half[k % 2][n - 1 - i];
        }
        call.out[i] = x;
        """,
        "",
    ),
    # The last thread sees all writes: a fence before the atomic access, and one after it.
    "fence": (
        96,
        """
        __shared__ unsigned came;
        if (i == 0) came = 0;
        __syncthreads();
        s[i] = n - 1 - i;
        __threadfence_block();
        if (atomicAdd(&came, 1u) == n - 1) {
          __threadfence_block();
          for (int k = 0; k < n; ++k) call.out[k] = s[k];
        }
        """,
        "",
    ),
    "no fence": (
        96,
        """
        __shared__ unsigned came;
        if (i == 0) came = 0;
        __syncthreads();
        s[i] = n - 1 - i;
        if (atomicAdd(&came, 1u) == n - 1)
          for (int k = 0; k < n; ++k) call.out[k] = s[k];
        """,
        "data race",
    ),
    "no barrier": (96, "s[i] = i;" + REVERSED, "data race"),
    "only of a warp": (96, "s[i] = i; __syncwarp();" + REVERSED, "data race"),
    # A shuffle synchronises lanes, but does not order memory.
    "only a shuffle": (32, "s[i] = i; __shfl_sync(0xffffffffu, i, 0);" + REVERSED, "data race"),
    # Without double buffering, a thread overwrites data that a slower one may still read.
    "one half": (
        96,
        """
        int x = i;
        for (int k = 0; k < 9; ++k) {
          s[i] = x;
          __syncthreads();
          x = s[n - 1 - i];
        }
        call.out[i] = x;
        """,
        "data race",
    ),
    "two writers": (96, "if (i % 32 == 0) call.out[0] = i;", "data race"),
}
# Each kernel runs in a separate process, which a sanitizer may terminate.
SCRIPT = r"""
import json, os, sys, tempfile
import numpy as np
from cuda_emulation import Library
source, sizes, sanitize = json.loads(sys.argv[1])
kernels = {f"kernel_{i}": "Call" for i in range(len(sizes))}
library = Library(source, kernels, sanitize=sanitize, threads=sanitize == "thread")
found = []
for kernel, size in zip(kernels, sizes):
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            for order in ("forward", "reverse", "random"):
                out = np.zeros(size, np.int32)
                arguments = out.ctypes.data.to_bytes(8, sys.byteorder)
                library.launch(kernel, (2, 1, 1), (size, 1, 1), 4 * size, arguments, order=order)
                assert out.tolist() == list(range(size))[::-1], out
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        found.append((os.waitstatus_to_exitcode(status), said.read().decode()))
print(json.dumps(found))
"""


def run_sanitized(sanitize: str, cases: dict[str, tuple[int, str, str]]) -> dict:
    """The exit code and standard error of every case."""
    source = "struct Call { int* out; };\n"
    for i, (_, body, _) in enumerate(cases.values()):
        source += (
            f'extern "C" __global__ void kernel_{i}(const Call call) {{\n'
            "FL_DYNAMIC_SHARED(memory);\nint* s = reinterpret_cast<int*>(memory);\n"
            f"int i = threadIdx.x, n = blockDim.x;\n{body}\n}}\n"
        )
    sizes = [size for size, _, _ in cases.values()]
    arguments = json.dumps([source, sizes, sanitize])
    try:
        result = cuda_emulation.sanitized_python(SCRIPT, sanitize.partition(",")[0], arguments)
    except OSError as error:
        _absent(f"sanitizer.{sanitize}", error)
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(zip(cases, json.loads(result.stdout), strict=True))


def check_sanitized(found: tuple[int, str], message: str) -> None:
    code, said = found
    if message:
        assert code != 0
        assert message in said
        assert "kernels.cu" in said
    else:
        assert code == 0, said


@pytest.fixture(scope="module")
def address_sanitized() -> dict:
    return run_sanitized("address", ADDRESS)


@pytest.fixture(scope="module")
def undefined_sanitized() -> dict:
    return run_sanitized("address,undefined", UNDEFINED)


@pytest.fixture(scope="module")
def thread_sanitized() -> dict:
    return run_sanitized("thread", THREAD)


@pytest.mark.parametrize("name", ADDRESS)
def test_address_sanitizer(address_sanitized, name):
    check_sanitized(address_sanitized[name], ADDRESS[name][2])


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined_behaviour_sanitizer(undefined_sanitized, name):
    check_sanitized(undefined_sanitized[name], UNDEFINED[name][2])


@pytest.mark.parametrize("name", THREAD)
def test_thread_sanitizer(thread_sanitized, name):
    check_sanitized(thread_sanitized[name], THREAD[name][2])


def test_address_sanitizer_forgets_a_failed_launch():
    # Its threads stop with arrays on their stacks, which the next launch reuses.
    source = """
    struct Call { int* out; };
    __device__ void use(volatile int* x, int n) { for (int k = 0; k < n; ++k) x[k] = k; }
    extern "C" __global__ void bad(const Call call) {
      volatile int x[100], y[7];
      use(x, 100), use(y, 7);
      if (threadIdx.x < 40) __syncthreads();
      call.out[threadIdx.x] = x[1] + y[1];
    }
    extern "C" __global__ void good(const Call call) {
      volatile int x[300];
      use(x, 300);
      __syncthreads();
      call.out[threadIdx.x] = x[threadIdx.x];
    }
    """
    code = f"""if True:
    import sys
    import numpy as np
    from cuda_emulation import LaunchError, Library
    library = Library({source!r}, dict(good="Call", bad="Call"), sanitize="address")
    out = np.zeros(96, np.int32)
    for kernel in ("bad", "good") * 3:
        arguments = out.ctypes.data.to_bytes(8, sys.byteorder)
        try:
            library.launch(kernel, (1, 1, 1), (96, 1, 1), 0, arguments)
            assert kernel == "good"
        except LaunchError:
            assert kernel == "bad"
    assert out.tolist() == list(range(96))
    """
    try:
        result = cuda_emulation.sanitized_python(code, "address")
    except OSError as error:
        _absent("sanitizer.address", error)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["address", "thread"])
def test_a_process_without_the_sanitizer_is_told_how_to_get_it(name):
    with pytest.raises(RuntimeError, match=rf"sanitize: '{name}' .*preload\('{name}'\)"):
        Library(SUMS, {"total": "Total"}, sanitize=name, threads=name == "thread")


def test_thread_sanitizer_wants_threads():
    with pytest.raises(ValueError, match="threads=True"):
        Library(SUMS, {"total": "Total"}, sanitize="thread")
