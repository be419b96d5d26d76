"""Run CUDA kernels on the CPU: generated source is compiled as C++, and a cluster's threads become fibers.

The device functions of `tdc_tvm.schedules.cuda.intrinsics` have portable definitions here; a product
on tensor cores is computed when all 32 lanes of a warp have brought their registers.  What hardware
leaves open is drawn at random, from a seed: some warps run far ahead of others and stop anywhere,
asynchronous copies arrive at once or not before something waits for them, in any order.  Shared
memory starts as NaN and becomes NaN when its block has ended.  So a missing barrier shows as a wrong
result, and a wait for what never comes, or a copy that nothing waits for, as an error.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx
from tvm.support import cc
from tvm.target import Target

from tdc_tvm.schedules.cuda.lowering import TIR_PIPELINE

CALLBACK = "tvm_callback_cuda_compile"
SHARED_BYTES = 228 * 1024
# By bit of what a run returns.
FAULTS = (
    "some threads wait for what never comes",
    "a copy was never waited for",
    "more arrivals at a mailbox than it was opened for",
    "a misaligned or empty bulk copy",
    "cluster barriers are not paired",
    "a block ended before a bulk copy from or to it",
    "a bulk copy between different places of a row of banks, which is slow",
)

PRELUDE = """
#define TDC_EMULATED
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <ucontext.h>
#include <vector>
using std::max;
using std::min;
#define CUDART_INF_F std::numeric_limits<float>::infinity()
#define __global__
#define __launch_bounds__(...)
typedef _Float16 half;
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    bits = value != value ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
  operator float() const {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { int x; };
static Index blockIdx, threadIdx;

enum State { READY, AT_BARRIER, AT_WARP, AT_CLUSTER, DONE };
struct Copy { float* to; const void* from; bool valid, done; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  int block, thread, phase;
  int barrier, expected;  // at which of a block's barriers, and for how many threads, it waits
  std::deque<std::vector<Copy>> groups;  // committed copies, by group
  std::vector<Copy> copies;
  std::vector<size_t> products;  // of four warps, begun before each commit
  size_t product;
};
struct BulkCopy { float* to; const float* from; int bytes, box, rank, source; bool done; };
struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  float *c0[32], *c1[32], values[32];
  const float *a0[32], *a1[32], *b[32];
};
// Products of four warps: which are begun when all 128 threads have come, and computed in order, at any time until
// something waits for them.
struct GroupProduct { int arrived = 0; float* sums[128]; uint64_t a, b; int channels; };
struct Group { std::vector<GroupProduct> products; size_t done = 0; };
static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<Group> groups_of_warps;
static std::vector<float> shared_memory;
static Fiber* self;
static int threads_of_block, cluster_arrived, cluster_phase;
static long progress;
static int faults;
static std::vector<BulkCopy> bulk_copies;
static uint64_t random_state;
static bool one_in(unsigned n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return unsigned(random_state >> 11) % n == 0;
}
static unsigned draw(unsigned n) {
  one_in(1);
  return unsigned(random_state >> 11) % n;
}
// What the caller is told: threads that wait for ever are 1.
enum Fault { LEFT_COPY = 2, BAD_ARRIVAL = 4, MISALIGNED = 8, UNPAIRED = 16, LEFT_BULK_COPY = 32, SLOW = 64 };
static void expect(bool holds, Fault fault) { if (!holds) faults |= fault; }
static void (*body)(void**);
static void** arguments;

static float* shared_of(int block) { return shared_memory.data() + block * (SHARED_BYTES / 4); }
static void wait_as(State state) {
  self->state = state;
  Fiber* mine = self;
  swapcontext(&mine->context, &scheduler);
}
static void maybe_stop(unsigned n) {
  if (!one_in(n)) return;
  ++progress;
  wait_as(READY);
}
static void tdc_meet(int number, int threads) {
  self->barrier = number;
  self->expected = threads;
  wait_as(AT_BARRIER);
}
static void __syncthreads() { tdc_meet(0, threads_of_block); }
static void enter() {
  body(arguments);
  self->state = DONE;
}

static void tdc_move1(void* to, const void* from) { maybe_stop(16); memcpy(to, from, 4); }
static void tdc_move2(void* to, const void* from) { maybe_stop(16); memcpy(to, from, 8); }
static void tdc_move4(void* to, const void* from) { maybe_stop(16); memcpy(to, from, 16); }
static void tdc_load(float* to, const void* from, bool valid) {
  if (valid) memcpy(to, from, 16); else memset(to, 0, 16);
}
// Addresses as PTX counts them.
static int tdc_base(const void* start) { return (const char*)start - (const char*)shared_of(self->block); }
static float* at(int address, int block) { return shared_of(block) + address / 4; }
static void finish(Copy& copy) {
  if (!copy.done) tdc_load(copy.to, copy.from, copy.valid);
  copy.done = true;
}
static void tdc_copy(int to, const void* from, bool valid) {
  maybe_stop(8);
  self->copies.push_back({at(to, self->block), from, valid, false});
  if (one_in(3)) finish(self->copies.back());
}
static void tdc_commit() {
  self->groups.push_back(std::move(self->copies));
  self->copies.clear();
}
static void await_groups(size_t pending) {
  maybe_stop(4);
  for (; self->groups.size() > pending; self->groups.pop_front())
    for (Copy& copy : self->groups.front()) finish(copy);
  for (auto& group : self->groups)
    for (Copy& copy : group)
      if (one_in(3)) finish(copy);
}
#define AWAIT(pending) static void tdc_await##pending() { await_groups(pending); }
AWAIT(0) AWAIT(1) AWAIT(2) AWAIT(3) AWAIT(4) AWAIT(5) AWAIT(6) AWAIT(7)
static void tdc_launch_dependents() {}
static void tdc_wait_for_dependencies() {}
template <class T> static void gather(float* to, const void* from, int count) {
  T values[16 / sizeof(T)];
  for (int i = 0; i < int(16 / sizeof(T)); ++i) values[i] = i < count ? ((const T*)from)[i] : T(0.f);
  memcpy(to, values, 16);
}
static void tdc_gather_float32(float* to, const void* from, int count) { gather<float>(to, from, count); }
static void tdc_gather_float16(float* to, const void* from, int count) { gather<half>(to, from, count); }
static void tdc_gather_bfloat16(float* to, const void* from, int count) { gather<nv_bfloat16>(to, from, count); }
template <class T> static float pack(float low, float high) {
  T pair[2] = {T(low), T(high)};
  float word;
  memcpy(&word, pair, 4);
  return word;
}
static float tdc_pack_float16(float low, float high) { return pack<half>(low, high); }
static float tdc_pack_bfloat16(float low, float high) { return pack<nv_bfloat16>(low, high); }
template <class T> static void unpack(float* to, const float* from) {
  T pair[2];
  memcpy(pair, from, 4);
  to[0] = float(pair[0]), to[1] = float(pair[1]);
}
static void tdc_unpack_float16(float* to, const float* from) { unpack<half>(to, from); }
static void tdc_unpack_bfloat16(float* to, const float* from) { unpack<nv_bfloat16>(to, from); }
static float tdc_tf32(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  word = value != value ? word : (word + 0x1000) & 0xffffe000;
  memcpy(&value, &word, 4);
  return value;
}
// What tensor cores multiply: of FP32 what TF32 has room for, the rest cut off.
template <class T> static float operand(T value) { return float(value); }
template <> float operand(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  word &= 0xffffe000;
  memcpy(&value, &word, 4);
  return value;
}
static Warp& warp_of_self() { return warps[(self->block * threads_of_block + self->thread) / 32]; }
// `last` is done when all lanes have come.
template <class F> static void with_warp(F last) {
  Warp& warp = warp_of_self();
  unsigned generation = warp.generation;
  if (++warp.arrived == 32) {
    last();
    warp.arrived = 0;
    ++warp.generation;
    ++progress;
  } else {
    while (warp.generation == generation) wait_as(AT_WARP);
  }
}
static void __syncwarp() { with_warp([] {}); }
static float tdc_swap(float value, int mask) {
  Warp& warp = warp_of_self();
  int lane = self->thread % 32;
  warp.values[lane] = value;
  __syncwarp();
  value = warp.values[lane ^ mask];
  __syncwarp();
  return value;
}
static int tdc_uniform(int value) { return value; }
template <class T> static void mma(float* c0, float* c1, const float* a0, const float* a1, const float* b) {
  Warp& warp = warp_of_self();
  int lane = self->thread % 32;
  warp.c0[lane] = c0; warp.c1[lane] = c1; warp.a0[lane] = a0; warp.a1[lane] = a1; warp.b[lane] = b;
  with_warp([&] {
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) {
        float sums[2] = {0, 0};
        for (int quarter = 0; quarter < 4; ++quarter) {
          int source = row % 8 * 4 + quarter;
          const T* b = (const T*)warp.b[column * 4 + quarter];
          for (int word = 0; word < 4; ++word) {
            const float* fragment = word < 2 ? warp.a0[source] : warp.a1[source];
            const T* a = (const T*)(fragment + word % 2 * 2 + row / 8);
            for (int i = 0; i < int(4 / sizeof(T)); ++i)
              sums[word / 2] += operand(a[i]) * operand(b[word * (4 / sizeof(T)) + i]);
          }
        }
        int owner = row % 8 * 4 + column / 2, place = row / 8 * 2 + column % 2;
        warp.c0[owner][place] += sums[0];
        warp.c1[owner][place] += sums[1];
      }
  });
}
#define MMA(dtype, T) \\
  static void tdc_mma_##dtype(float* c0, float* c1, const float* a0, const float* a1, const float* b) { \\
    mma<T>(c0, c1, a0, a1, b); \\
  }
MMA(float16, half)
MMA(bfloat16, nv_bfloat16)
MMA(float32, float)
static Group& group_of_self() { return groups_of_warps[(self->block * threads_of_block + self->thread) / 128]; }
template <class T> static void multiply_group(const GroupProduct& product, int block) {
  // An address, and how far apart the two halves of the depth and eights of rows are, in 16 bytes; or rows of 64
  // bytes, swizzled.
  auto at = [&](uint64_t matrix, int row, int half) {
    if (matrix >> 62 == 2) {
      unsigned byte = 16 * ((matrix & 0x3fff) + row / 8 * (matrix >> 32 & 0x3fff) + row % 8 * 4 + half);
      return (const T*)((const char*)shared_of(block) + (byte ^ (byte >> 7 & 3) << 4));
    }
    int vector = (matrix & 0x3fff) + half * (matrix >> 16 & 0x3fff) + row / 8 * (matrix >> 32 & 0x3fff) + row % 8;
    return (const T*)(shared_of(block) + vector * 4);
  };
  constexpr int n = 16 / sizeof(T);
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < product.channels; ++column) {
      float sum = 0;
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < n; ++i)
          sum += operand(at(product.a, row, half)[i]) * operand(at(product.b, column, half)[i]);
      int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      product.sums[thread][column / 8 * 4 + row / 8 % 2 * 2 + column % 2] += sum;
    }
}
static void (*group_multiply)(const GroupProduct&, int);
static bool finish_product(Group& group) {
  if (group.done == group.products.size() || group.products[group.done].arrived < 128) return false;
  group_multiply(group.products[group.done++], self->block);
  ++progress;
  return true;
}
template <class T> static void wgmma(float* c, int a, int a_eights, int b, int b_eights, int channels) {
  maybe_stop(16);
  Group& group = group_of_self();
  if (group.products.size() <= self->product) group.products.resize(self->product + 1);
  GroupProduct& product = group.products[self->product++];
  product.a = uint64_t(unsigned(a_eights)) << 32 | unsigned(a);
  product.b = uint64_t(b_eights) << 32 | unsigned(b);
  product.channels = channels;
  product.sums[self->thread % 128] = c;
  group_multiply = multiply_group<T>;
  if (++product.arrived == 128)
    while (one_in(2) && finish_product(group)) {}
}
static void wait_for_products(size_t pending) {
  maybe_stop(4);
  size_t commits = self->products.size();
  size_t last = commits > pending ? self->products[commits - pending - 1] : 0;
  while (group_of_self().done < last)
    if (!finish_product(group_of_self())) wait_as(AT_WARP);
}
static void tdc_wgmma_commit() { self->products.push_back(self->product); }
static void tdc_wgmma_wait() { wait_for_products(1); }
#define WGMMA(n) \\
  static void tdc_wgmma_begin_##n(float*) {} \\
  static void tdc_wgmma_end_##n(float*) { wait_for_products(0); } \\
  static void tdc_wgmma_float16_##n(float* c, int a, int ae, int b, int be) { wgmma<half>(c, a, ae, b, be, n); } \\
  static void tdc_wgmma_bfloat16_##n(float* c, int a, int ae, int b, int be) { \\
    wgmma<nv_bfloat16>(c, a, ae, b, be, n); \\
  } \\
  static void tdc_wgmma_float32_##n(float* c, int a, int ae, int b, int be) { wgmma<float>(c, a, ae, b, be, n); }
WGMMA(32) WGMMA(64) WGMMA(96) WGMMA(128) WGMMA(160) WGMMA(192) WGMMA(256)
static void tdc_cluster_arrive() {
  maybe_stop(2);
  expect(self->phase < 0, UNPAIRED);
  self->phase = cluster_phase;
  if (++cluster_arrived == int(fibers.size())) {
    cluster_arrived = 0;
    ++cluster_phase;
    ++progress;
  }
}
static void tdc_cluster_wait() {
  expect(self->phase >= 0, UNPAIRED);
  while (cluster_phase == self->phase) wait_as(AT_CLUSTER);
  self->phase = -1;
}
// A phase is over when all have arrived and all expected bytes have come, in any order.
struct Mailbox { int missing; uint8_t arrivals, waiting; uint16_t phase; };
static Mailbox& mailbox(int box, int rank) { return *(Mailbox*)at(box, rank); }
static void settle(Mailbox& box) {
  ++progress;
  if (box.waiting || box.missing) return;
  box.waiting = box.arrivals;
  ++box.phase;
}
static void tdc_mailbox_open(int box, int arrivals) {
  mailbox(box, self->block) = {0, uint8_t(arrivals), uint8_t(arrivals), 0};
}
static void arrive(Mailbox& box, int bytes) {
  expect(box.waiting > 0, BAD_ARRIVAL);
  box.missing += bytes;
  box.waiting -= 1;
  settle(box);
}
static void tdc_mailbox_expect(int box, int bytes) {
  maybe_stop(2);
  arrive(mailbox(box, self->block), bytes);
}
static void tdc_mailbox_wait(int box, int parity) {
  maybe_stop(3);
  while (mailbox(box, self->block).phase % 2 == parity) wait_as(AT_CLUSTER);
}
static void finish(BulkCopy& copy) {
  if (!copy.done) memcpy(copy.to, copy.from, copy.bytes);
  copy.done = true;
}
static void begin(float* to, const float* from, int bytes, int box, int rank) {
  maybe_stop(2);
  bool aligned = uintptr_t(from) % 16 == 0 && (to - shared_of(rank)) % 4 == 0 && bytes % 16 == 0 && box % 8 == 0;
  expect(aligned && bytes > 0, MISALIGNED);
  bulk_copies.push_back({to, from, bytes, box, rank, self->block, false});
  if (one_in(3)) finish(bulk_copies.back());  // the data; the mailbox hears of it later
  ++progress;
}
static void tdc_send(int from, int to, int box, int rank, int bytes) {
  expect((from - to) % 128 == 0, SLOW);
  begin(at(to, rank), at(from, self->block), bytes, box, rank);
}
static void tdc_fetch(int to, const void* from, int bytes, int box) {
  expect(to % 128 == 0, SLOW);
  begin(at(to, self->block), (const float*)from, bytes, box, self->block);
}
static void tdc_fetch_once(int to, const void* from, int bytes, int box) { tdc_fetch(to, from, bytes, box); }
static void complete_a_bulk_copy() {
  std::swap(bulk_copies[draw(bulk_copies.size())], bulk_copies.back());
  BulkCopy copy = bulk_copies.back();
  bulk_copies.pop_back();
  finish(copy);
  Mailbox& box = mailbox(copy.box, copy.rank);
  expect(box.arrivals > 0, BAD_ARRIVAL);
  box.missing -= copy.bytes;
  settle(box);
}
static void tdc_fence_copies() {}

static unsigned copy_steps;  // of the scheduler, until a bulk copy is complete, about
static int run_cluster(int first_block, int blocks) {
  std::fill(shared_memory.begin(), shared_memory.end(), std::numeric_limits<float>::quiet_NaN());
  std::fill(warps.begin(), warps.end(), Warp());
  std::fill(groups_of_warps.begin(), groups_of_warps.end(), Group());
  cluster_arrived = cluster_phase = 0;
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = READY;
    fiber.block = i / threads_of_block;
    fiber.thread = i % threads_of_block;
    fiber.phase = -1;
    fiber.groups.clear();
    fiber.products.clear();
    fiber.product = 0;
    fiber.copies.clear();
    fiber.stack.resize(64 * 1024);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  bulk_copies.clear();
  int warp_count = fibers.size() / 32, alive = fibers.size();
  std::vector<bool> ended(blocks);
  std::vector<int> speeds(warp_count);
  long idle = 0;
  for (long step = 0; alive > 0; ++step) {
    if (step % 64 == 0)
      for (int& speed : speeds) speed = one_in(3) ? 0 : 1 + draw(8);
    long before = progress;
    int warp = draw(warp_count);
    for (int turns = speeds[warp] + one_in(8); turns > 0; --turns)
      for (unsigned lane = 0, first = draw(32); lane < 32; ++lane) {
        Fiber& fiber = fibers[warp * 32 + (lane + first) % 32];
        if (fiber.state == DONE || fiber.state == AT_BARRIER) continue;
        self = &fiber;
        blockIdx.x = first_block + fiber.block;
        threadIdx.x = fiber.thread;
        swapcontext(&scheduler, &fiber.context);
        if (fiber.state != DONE) continue;
        --alive;
        ++progress;
      }
    for (int block = 0; block < blocks; ++block) {
      Fiber* first = &fibers[block * threads_of_block];
      auto all = [&](State state) {
        return std::all_of(first, first + threads_of_block, [=](const Fiber& fiber) { return fiber.state == state; });
      };
      std::array<int, 16> arrived = {};
      for (int thread = 0; thread < threads_of_block; ++thread)
        if (first[thread].state == AT_BARRIER) ++arrived[first[thread].barrier];
      for (int thread = 0; thread < threads_of_block; ++thread) {
        Fiber& fiber = first[thread];
        if (fiber.state != AT_BARRIER || arrived[fiber.barrier] != fiber.expected) continue;
        fiber.state = READY;
        ++progress;
      }
      if (ended[block] || !all(DONE)) continue;
      ended[block] = true;
      for (const BulkCopy& copy : bulk_copies) expect(copy.source != block && copy.rank != block, LEFT_BULK_COPY);
      float* shared = shared_of(block);
      std::fill(shared, shared + SHARED_BYTES / 4, std::numeric_limits<float>::quiet_NaN());
    }
    if (!bulk_copies.empty() && one_in(copy_steps)) complete_a_bulk_copy();
    idle = progress == before ? idle + 1 : 0;
    if (idle < 40L * warp_count + 4000) continue;
    if (bulk_copies.empty()) return 1;
    complete_a_bulk_copy();
    idle = 0;
  }
  for (Fiber& fiber : fibers)
    for (auto& group : fiber.groups)
      for (Copy& copy : group) expect(copy.done, LEFT_COPY);
  return 0;
}
static int run(void (*kernel)(void**), void** args, int blocks, int cluster, int threads) {
  body = kernel;
  arguments = args;
  faults = 0;
  static uint64_t runs = 0;
  random_state = 0x9e3779b97f4a7c15 * ++runs;
  copy_steps = 1u << draw(8);
  threads_of_block = threads;
  fibers.resize(cluster * threads);
  warps.resize((cluster * threads + 31) / 32);
  groups_of_warps.resize((cluster * threads + 127) / 128);
  shared_memory.resize(size_t(cluster) * (SHARED_BYTES / 4));
  for (int block = 0; block < blocks; block += cluster)
    if (run_cluster(block, cluster)) return faults | 1;
  return faults;
}
"""


def launches_of(func: tirx.PrimFunc) -> list[tuple[int, int, int]]:
    """Blocks, blocks of a cluster and threads of each kernel of a scheduled function."""
    body = func.body.block.body
    launches = []
    for loop in getattr(body, "seq", [body]):
        extents: dict[str, int] = {}
        while isinstance(loop, tirx.For):
            extents[loop.thread_binding.thread_tag] = int(loop.extent)
            loop = loop.body
        launches.append((extents["blockIdx.x"], extents.get("clusterCtaIdx.x", 1), extents["threadIdx.x"]))
    return launches


def cuda_source(functions: dict[str, tirx.PrimFunc], arch: str = "sm_90") -> str:
    """The CUDA that TVM generates; no CUDA compiler is needed."""
    target = Target({"kind": "cuda", "arch": arch})
    original = tvm_ffi.get_global_func(CALLBACK)
    tvm_ffi.register_global_func(CALLBACK, lambda source: b"not compiled", override=True)
    try:
        module = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
        with target:
            built = tvm.tirx.build(tvm.IRModule(module), target=target, pipeline=TIR_PIPELINE)
    finally:
        tvm_ffi.register_global_func(CALLBACK, original, override=True)
    return built.imports[0].inspect_source()


class Emulator:
    """Kernels that can be called with NumPy arrays; ``edit`` can change their source."""

    def __init__(
        self, functions: dict[str, tirx.PrimFunc], folder: Path, edit: Callable[[str], str] = lambda source: source
    ):
        source = edit(cuda_source(functions))
        # What stands before the kernels is for NVIDIA's compiler, or is defined above.
        source = source[source.index('extern "C" __global__') :]
        source = re.sub(
            r"extern __shared__ __align__\(64\) \w+ (\w+)\[\];", r"float* \1 = shared_of(self->block);", source
        )
        self.functions = functions
        self.kernels: dict[str, list[tuple[str, list[str], tuple[int, int, int]]]] = {}
        entries = []
        for name, func in functions.items():
            signatures = re.findall(
                rf"void\s+(?:__launch_bounds__\([\d, ]+\)\s+)?({name}_kernel(?:_\d+)?)\(([^)]*)\)\s*{{", source
            )
            launches = launches_of(func)
            assert len(signatures) == len(launches), source
            self.kernels[name] = []
            for (kernel, signature), launch in zip(signatures, launches, strict=True):
                params = re.findall(r"(\w+)\* __restrict__ (\w+?)_ptr\b", signature)
                self.kernels[name].append((kernel, [param for _, param in params], launch))
                values = ", ".join(f"({c_type}*)args[{i}]" for i, (c_type, _) in enumerate(params))
                entries.append(
                    f'extern "C" int run_{kernel}(void** args, int blocks, int cluster, int threads) {{\n'
                    f"  return run([](void** args) {{ {kernel}({values}); }}, args, blocks, cluster, threads);\n}}"
                )
        path, library = folder / "kernels.cc", folder / "kernels.so"
        prelude = PRELUDE.replace("SHARED_BYTES", str(SHARED_BYTES))
        path.write_text("\n".join([prelude, source, *entries]))
        # Loads stay where they are: a GPU's compiler does not move them behind a condition either.
        options = ["-std=c++17", "-O1", "-fno-tree-sink", "-w", "-fno-strict-aliasing", "-shared", "-fPIC"]
        subprocess.run([cc.get_cc(), *options, "-o", str(library), str(path)], check=True)
        self.library = ctypes.CDLL(str(library))

    def __call__(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Run a function on contiguous arrays, in the order of its parameters.

        What is read or written behind the end of one ends the process.
        """
        names = [param.name for param in self.functions[name].params]
        guarded = [_before_guard(array) for array in arrays]
        by_name = dict(zip(names, guarded, strict=True))
        for kernel, params, launch in self.kernels[name]:
            pointers = [by_name[param].ctypes.data_as(ctypes.c_void_p) for param in params]
            faults = self.library[f"run_{kernel}"]((ctypes.c_void_p * len(pointers))(*pointers), *launch)
            found = [text for bit, text in enumerate(FAULTS) if faults >> bit & 1]
            assert not found, f"{kernel}: {'; '.join(found)}"
        for array, copy in zip(arrays, guarded, strict=True):
            if array.flags.writeable:
                array[...] = copy


def _before_guard(array: np.ndarray) -> np.ndarray:
    """A copy that ends, but for less than 16 bytes, where a page begins that nobody may touch."""
    room = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, room + mmap.PAGESIZE)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(region)) + room
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) == 0
    copy = np.frombuffer(region, np.uint8, array.nbytes, room - -(-array.nbytes // 16) * 16)
    copy = copy.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
