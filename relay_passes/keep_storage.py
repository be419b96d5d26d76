"""An entry point of a network whose caller keeps the memory between its kernels: a recorded CUDA graph writes to it."""

from __future__ import annotations

import tvm
from tvm import relax

from tdc_tvm.cuda_graph import ENTRY

_ALLOC_STORAGE = tvm.ir.Op.get("relax.memory.alloc_storage")


@tvm.transform.module_pass(opt_level=0, name="KeepStorage")
def keep_storage(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Add `ENTRY`, which does what ``main`` does, and gives its storages besides."""
    main = relax.utils.copy_with_new_vars(mod["main"])
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    storages = [
        binding.var
        for binding in bindings
        if isinstance(binding.value, relax.Call) and binding.value.op == _ALLOC_STORAGE
    ]
    kept = relax.TupleType([storage.ty for storage in storages])
    entry = relax.Function(
        main.params,
        relax.SeqExpr(main.body.blocks, relax.Tuple([main.body.body, relax.Tuple(storages)])),
        relax.TupleType([main.ret_ty, kept]),
        bool(main.is_pure),
        main.attrs,
    )
    mod[ENTRY] = entry.with_attr("global_symbol", ENTRY)
    return mod
