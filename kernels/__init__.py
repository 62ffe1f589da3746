"""Masking gather, normalised-pixel loss, mimic loss and mask ids: the reference and its Triton twins."""
