"""Moving a chain of bindings into a function of its own, to be lowered to one kernel later."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax

# Marks an outlined layer; the value is the operator's kind.
KIND_ATTR = "Composite"
NAME_ATTR = "tdc.name"
CONV2D = "tdc.conv2d"
TUCKER_CONV = "tdc.tucker_conv"
POOL2D = "tdc.pool2d"


@dataclass(frozen=True)
class Chain:
    """Bindings that become one operator.

    Parameters
    ----------
    kind : str
        ``CONV2D``, ``TUCKER_CONV`` or ``POOL2D``.
    name : str
        The layer's name.
    variables : list[relax.Var]
        In program order; only the last one is used outside the chain.
    """

    kind: str
    name: str
    variables: list[relax.Var]


def outline(mod: tvm.IRModule, values: dict[relax.Var, relax.Expr], chains: list[Chain]) -> tvm.IRModule:
    """Replace each chain in ``main`` by a call of a new private function that computes it.

    Parameters
    ----------
    mod : tvm.IRModule
        The module; it is not changed.
    values : dict
        The expression that each variable of ``main`` is bound to.
    chains : list[Chain]
        They must not share variables.
    """
    if not chains:
        return mod
    outliner = _Outliner(mod, values, {chain.variables[-1]: chain for chain in chains})
    main = outliner.visit_expr(mod["main"])
    outliner.builder_.update_func(mod.get_global_var("main"), main)
    return relax.transform.DeadCodeElimination()(outliner.builder_.get())


@relax.expr_functor.mutator
class _Outliner(relax.PyExprMutator):
    def __init__(self, mod: tvm.IRModule, values: dict[relax.Var, relax.Expr], chains: dict[relax.Var, Chain]) -> None:
        super().__init__(mod)
        self.values = values
        self.chains = chains

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        chain = self.chains.get(binding.var)
        if chain is None:
            super().visit_var_binding_(binding)
            return
        function, inputs = _function(chain, self.values)
        callee = self.builder_.add_func(function, f"{chain.kind.removeprefix('tdc.')}_{len(self.chains)}")
        call = relax.Call(callee, [self.visit_expr(var) for var in inputs])
        # The call keeps the layer's name for readers of the module.
        var = self.builder_.emit(call, chain.variables[0].name)
        self.set_var_remap(binding.var, var)


def _function(chain: Chain, values: dict[relax.Var, relax.Expr]) -> tuple[relax.Function, list[relax.Var]]:
    """The chain as a function, and the outer variables that are its arguments."""
    inner: dict[relax.Var, relax.Var] = {}
    inputs: list[relax.Var] = []
    bindings = []
    for var in chain.variables:
        call = values[var]
        args = []
        for arg in call.args:
            if isinstance(arg, relax.Var) and arg not in inner:
                inner[arg] = relax.Var(arg.name, arg.ty)
                inputs.append(arg)
            args.append(inner.get(arg, arg) if isinstance(arg, relax.Var) else arg)
        last = var.same_as(chain.variables[-1])
        inner[var] = (relax.Var if last else relax.DataflowVar)(var.name, var.ty)
        renamed = relax.Call(call.op, args, call.attrs)
        bindings.append(relax.VarBinding(inner[var], relax.BlockBuilder().normalize(renamed)))
    result = inner[chain.variables[-1]]
    function = relax.Function(
        [inner[var] for var in inputs],
        relax.SeqExpr([relax.DataflowBlock(bindings)], result),
        result.ty,
    )
    return function.with_attr(KIND_ATTR, chain.kind).with_attr(NAME_ATTR, chain.name), inputs
