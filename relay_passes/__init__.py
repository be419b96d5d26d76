"""Relax passes from an imported model to scheduled kernels (Relay left TVM in 0.20; the name is the project's)."""
