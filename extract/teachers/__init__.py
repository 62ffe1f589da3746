"""Frozen teachers: an address becomes a model whose features are tokens on a grid."""
