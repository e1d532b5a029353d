"""Operators: schemas and fakes (`_library`), choice of implementation (`_dispatch`), and one
autograd.Function per differentiable op."""
