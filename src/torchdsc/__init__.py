"""Dynamic Subspace Composition: weights composed, token by token, from a shared bank of unit-norm rank-1 atoms."""
