"""What TensorIR cannot say: small device functions, each a call from TensorIR.

Tensor-core products on raw registers, asynchronous copies that fill with zeros, rounding to TF32,
stores into another block's shared memory, cluster barriers and programmatic dependent launch have
no form in TensorIR 0.27, or one that its passes insert by themselves and only for patterns of
their own.  ``TDC_EMULATED`` leaves the definitions out: the tests bring portable ones.
"""

from __future__ import annotations

from tvm import ir, tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.tirx.script.builder import ir as T

from tdc_tvm.schedules.cuda.work import WGMMA_ROWS
from tdc_tvm.schedules.kernel import Prologue
from tdc_tvm.schedules.shape import Epilogue

# Groups of copies that can be waited past.
MOST_PENDING = 7
_C_TYPES = {"float16": "half", "bfloat16": "nv_bfloat16", "float32": "float"}

# PTX's types of operands, depth of a product of ``mma`` and of ``wgmma``, and what follows that one's scales: both
# operands lie along the depth.
_MMA = {"float16": ("f16", 16, ", 0, 0"), "bfloat16": ("bf16", 16, ", 0, 0"), "float32": ("tf32", 8, "")}
_WGMMA_CHANNELS = tuple(4 * rows for rows in WGMMA_ROWS)


def _operands(count: int, start: int = 0) -> str:
    """Names of operands of inline assembly."""
    return ", ".join(f"%{start + i}" for i in range(count))


def _sums(count: int) -> str:
    """Operands of inline assembly that are read and written."""
    return ", ".join(f'"+f"(c[{i}])' for i in range(count))


# Definitions by name, without what makes them inline device functions.
_BODIES = {
    # 16 bytes to registers, zeros where there is nothing to read.
    "tdc_load": """void tdc_load(float* to, const void* from, bool valid) {
  *(uint4*)to = valid ? __ldg((const uint4*)from) : make_uint4(0, 0, 0, 0);
}""",
    # The same for rows that are not aligned: element by element.
    **{
        f"tdc_gather_{dtype}": f"""void tdc_gather_{dtype}(float* to, const void* start, int count) {{
  constexpr int n = 16 / sizeof({c_type});
  const {c_type}* from = (const {c_type}*)start;
  alignas(16) {c_type} values[n];
  #pragma unroll
  for (int i = 0; i < n; ++i) values[i] = i < count ? from[i] : {c_type}(0.f);
  *(uint4*)to = *(uint4*)values;
}}"""
        for dtype, c_type in _C_TYPES.items()
    },
    # Where shared memory begins.  The compiler would compute it anew for each use, from the number of the block
    # in its cluster, if it knew what this is.
    "tdc_base": """int tdc_base(const void* start) {
  int base;
  asm volatile("mov.u32 %0, %1;" : "=r"(base) : "r"((int)__cvta_generic_to_shared(start)));
  return base;
}""",
    "tdc_copy": """void tdc_copy(int to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  int size = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(size) : "memory");
#else
  uint4 value = valid ? __ldg((const uint4*)from) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
      :: "r"(to), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
#endif
}""",
    "tdc_commit": """void tdc_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}""",
    **{
        f"tdc_await{pending}": f"""void tdc_await{pending}() {{
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group {pending};" ::: "memory");
#endif
}}"""
        for pending in range(MOST_PENDING + 1)
    },
    # Two steps of 16 (FP16, BF16) or 8 (TF32) of the depth: sums (which can be the same) and
    # fragments of A for each, a fragment of B for both.
    **{
        f"tdc_mma_{dtype}": f"""void tdc_mma_{dtype}(
    float* c0, float* c1, const float* a0, const float* a1, const float* b) {{
#if __CUDA_ARCH__ >= 800
  #pragma unroll
  for (int i = 0; i < 2; ++i) {{
    const unsigned *a = (const unsigned*)(i ? a1 : a0), *r = (const unsigned*)b + 2 * i;
    float* c = i ? c1 : c0;
    asm("mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 "
        "{{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(r[0]), "r"(r[1]));
  }}
#else
  #pragma unroll
  for (int i = 0; i < 4; ++i) {{
    const unsigned *a = (const unsigned*)(i / 2 ? a1 : a0) + i % 2 * 2, *r = (const unsigned*)b + i;
    float* c = i / 2 ? c1 : c0;
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {{%0,%1,%2,%3}}, {{%4,%5}}, {{%6}}, {{%0,%1,%2,%3}};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(r[0]));
  }}
#endif
}}"""
        for dtype, (kind, depth, _) in _MMA.items()
    },
    # Products of four warps: sums of 64 rows of A and ``n`` of B, which descriptors point to; their upper halves are
    # distances between eights of rows, and the swizzling mode.
    **{
        f"tdc_wgmma_{dtype}_{n}": f"""void tdc_wgmma_{dtype}_{n}(
    float* c, int a, int a_eights, int b, int b_eights) {{
  asm volatile("{{\\n .reg .b64 a, b;\\n mov.b64 a, {{%{n // 2}, %{n // 2 + 1}}};\\n"
      "mov.b64 b, {{%{n // 2 + 2}, %{n // 2 + 3}}};\\n"
      "wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind} {{{_operands(n // 2)}}}, a, b, 1, 1, 1{end};\\n}}"
      : {_sums(n // 2)} : "r"(a), "r"(a_eights), "r"(b), "r"(b_eights));
}}"""
        for dtype, (kind, depth, end) in _MMA.items()
        for n in _WGMMA_CHANNELS
    },
    # Around them: sums are not touched meanwhile.
    **{
        f"tdc_wgmma_{name}_{n}": f"""void tdc_wgmma_{name}_{n}(float* c) {{
  asm volatile("wgmma.{instruction}.sync.aligned{operand};" : {_sums(n // 2)} :: "memory");
}}"""
        for name, instruction, operand in (("begin", "fence", ""), ("end", "wait_group", " 0"))
        for n in _WGMMA_CHANNELS
    },
    "tdc_wgmma_commit": """void tdc_wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}""",
    # For all groups but the last.
    "tdc_wgmma_wait": """void tdc_wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}""",
    "tdc_tf32": """float tdc_tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}""",
    "tdc_swap": """float tdc_swap(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}""",
    # The same in all lanes of a warp, for the compiler to know it.
    "tdc_uniform": """int tdc_uniform(int value) {
  return __shfl_sync(0xffffffffu, value, 0);
}""",
    "tdc_pack_float16": """float tdc_pack_float16(float low, float high) {
  half2 pair = __floats2half2_rn(low, high);
  return *(float*)&pair;
}""",
    "tdc_pack_bfloat16": """float tdc_pack_bfloat16(float low, float high) {
  nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *(float*)&pair;
}""",
    **{
        f"tdc_unpack_{dtype}": f"""void tdc_unpack_{dtype}(float* to, const float* from) {{
  {c_type} pair = *(const {c_type}*)from;
  to[0] = __low2float(pair), to[1] = __high2float(pair);
}}"""
        for dtype, c_type in (("float16", "half2"), ("bfloat16", "nv_bfloat162"))
    },
    # Of what is sent, mailboxes tell.  This only says that others' mailboxes are open, which have a fence of their
    # own, and that what they were sent has been used: a release would wait for all stores to global memory.
    "tdc_cluster_arrive": """void tdc_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}""",
    "tdc_cluster_wait": """void tdc_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}""",
    # Words between registers and memory; TensorIR's vectors must have indices that it can prove to be aligned.
    **{
        f"tdc_move{count}": f"""void tdc_move{count}(void* to, const void* from) {{
  *({c_type}*)to = *(const {c_type}*)from;
}}"""
        for count, c_type in ((1, "float"), (2, "float2"), (4, "float4"))
    },
    # Copies of weights, and between the blocks of a cluster: they count their bytes at a barrier beside the data,
    # so that nobody waits for more than the data it needs.
    "tdc_mailbox_open": """void tdc_mailbox_open(int box, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(box), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}""",
    "tdc_mailbox_expect": """void tdc_mailbox_expect(int box, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(box), "r"(bytes) : "memory");
}""",
    "tdc_mailbox_wait": """void tdc_mailbox_wait(int box, int parity) {
  asm volatile(
      "{\\n .reg .pred done;\\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\\n"
      "@!done bra again;\\n}" :: "r"(box), "r"(parity) : "memory");
}""",
    # Weights, which the next call reads again, are the last to leave the L2 cache, or the first where it has no room.
    **{
        name: f"""void {name}(int to, const void* from, int bytes, int box) {{
  asm volatile(
      "{{\\n .reg .b64 policy;\\n"
      "createpolicy.fractional.L2::{priority}.b64 policy, 1.0;\\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], policy;\\n}}"
      :: "r"(to), "l"(from), "r"(bytes), "r"(box) : "memory");
}}"""
        for name, priority in (("tdc_fetch", "evict_last"), ("tdc_fetch_once", "evict_first"))
    },
    # To the shared memory of another block of the cluster, where ``to`` and ``box`` lie in this one's.
    "tdc_send": """void tdc_send(int from, int to, int box, int rank, int bytes) {
  int remote, remote_box;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(to), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_box) : "r"(box), "r"(rank));
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :: "r"(remote), "r"(from), "r"(bytes), "r"(remote_box) : "memory");
}""",
    # What this thread has stored to shared memory is seen by copies that others begin after a barrier.
    "tdc_fence_copies": """void tdc_fence_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}""",
    # For a cooperative launch: the word's highest bit flips each time that all blocks have come.
    "tdc_grid_barrier": """void tdc_grid_barrier(float* word, int blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* arrived = (unsigned*)word;
    unsigned add = blockIdx.x == 0 ? 0x80000000u - (blocks - 1) : 1u;
    __threadfence();
    unsigned before = atomicAdd(arrived, add);
    while (((before ^ *(volatile unsigned*)arrived) & 0x80000000u) == 0) {}
    __threadfence();
  }
  __syncthreads();
}""",
    # Some warps of a block, which have a barrier of their own.
    "tdc_meet": """void tdc_meet(int number, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(threads) : "memory");
}""",
    "tdc_launch_dependents": """void tdc_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}""",
    "tdc_wait_for_dependencies": """void tdc_wait_for_dependencies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}""",
}


def call(name: str, *arguments: ir.Expr | int, returns: str = "void") -> ir.Expr:
    """Call a device function of the table above; ``returns`` is the type of its result."""
    source = f"#ifndef TDC_EMULATED\n__forceinline__ __device__ {_BODIES[name]}\n#endif\n"
    values = [tirx.const(value, "int32") if isinstance(value, int) else value for value in arguments]
    return cuda_func_call(name, *values, source_code=source, return_type=returns)


def run(name: str, *arguments: ir.Expr | int) -> None:
    """Emit a call as a statement."""
    T.evaluate(call(name, *arguments))


def address(buffer: tirx.Buffer, *indices: ir.Expr | int) -> ir.Expr:
    """The address of an element."""
    return tirx.address_of(buffer[tuple(indices)])


def barrier() -> None:
    """Wait for all threads of the block.

    TVM would insert the barriers that are missing, but between an unroll pragma and its loop, which
    then keeps its registers in memory.  So schedules leave none out.
    """
    T.evaluate(ir.Call("tirx.tvm_storage_sync", [ir.StringImm("shared.dyn")], ret_ty="void"))


def larger_of(one: ir.Expr, other: ir.Expr) -> ir.Expr:
    """The larger of two, or the one that is no number."""
    return tirx.Select(tirx.any(other > one, tirx.isnan(other)), other, one)


def clip(value: ir.Expr, bounds: Epilogue | Prologue) -> ir.Expr:
    """Apply bounds.  A NaN stays one, as in ONNX; CUDA's ``max`` and ``min`` would drop it."""
    # Bound to a name: TVM makes a branch of a selection among expressions that load.
    value = T.Bind(value)
    if bounds.clip_min is not None:
        bound = tirx.const(bounds.clip_min, "float32")
        value = tirx.Select(value < bound, bound, value)
    if bounds.clip_max is not None:
        bound = tirx.const(bounds.clip_max, "float32")
        value = tirx.Select(value > bound, bound, value)
    return value
