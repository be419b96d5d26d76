"""Entry points of a network whose caller keeps the memory between its kernels: a recorded CUDA graph writes to it."""

from __future__ import annotations

import tvm
from tvm import relax

from tdc_tvm.cuda_graph import with_storage

_ALLOC_STORAGE = tvm.ir.Op.get("relax.memory.alloc_storage")


@tvm.transform.module_pass(opt_level=0, name="KeepStorage")
def keep_storage(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Add to each entry point one, called as `with_storage` says, that does the same and gives its storages besides."""
    functions = {var.name_hint: func for var, func in mod.functions_items() if isinstance(func, relax.Function)}
    for name, function in functions.items():
        mod[with_storage(name)] = _with_storage(function).with_attr("global_symbol", with_storage(name))
    return mod


def _with_storage(function: relax.Function) -> relax.Function:
    main = relax.utils.copy_with_new_vars(function)
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    storages = [
        binding.var
        for binding in bindings
        if isinstance(binding.value, relax.Call) and binding.value.op == _ALLOC_STORAGE
    ]
    kept = relax.TupleType([storage.ty for storage in storages])
    return relax.Function(
        main.params,
        relax.SeqExpr(main.body.blocks, relax.Tuple([main.body.body, relax.Tuple(storages)])),
        relax.TupleType([main.ret_ty, kept]),
        bool(main.is_pure),
        main.attrs,
    )
