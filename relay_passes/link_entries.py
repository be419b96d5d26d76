"""Several modules become one: the ``main`` of each under a name of its own, equal kernels once."""

from __future__ import annotations

from collections.abc import Mapping

import tvm
from tvm import relax


def link_entries(mods: Mapping[str, tvm.IRModule]) -> tvm.IRModule:
    """One module with an entry point for each of ``mods``, called as its key.

    Parameters
    ----------
    mods : mapping of name to tvm.IRModule
        What `graph_passes` gave: ``main`` and the kernels that it calls.
    """
    if list(mods) == ["main"]:
        return mods["main"]
    builder = relax.BlockBuilder()
    for name, mod in mods.items():
        main = _Linker(mod, builder).visit_expr(mod["main"])
        builder.add_func(main.with_attr("global_symbol", name), name)
    return builder.get()


@relax.expr_functor.mutator
class _Linker(relax.PyExprMutator):
    """Calls of a module's kernels become calls of what ``builder`` calls them, which has equal ones once."""

    def __init__(self, mod: tvm.IRModule, builder: relax.BlockBuilder) -> None:
        super().__init__(mod)
        self.vars = {
            var: builder.add_func(function.without_attr("global_symbol"), var.name_hint)
            for var, function in mod.functions_items()
            if var.name_hint != "main"
        }

    def visit_global_var_(self, var: tvm.ir.GlobalVar) -> tvm.ir.GlobalVar:
        return self.vars[var]
