"""Symmetrical Distillation Networks: a frozen classifier teaches a generator that mirrors it.

Source: Yuan & Peng, "Text-to-image Synthesis via Symmetrical Distillation Networks",
ACM Multimedia 2018, arXiv:1808.06801.

Shape legend, used in every docstring and shape comment of this package:
    B  batch            C  channels         H, W  height and width in pixels
    D  text dimension   T  characters       N     number of samples
    Z  numbers of noise

Value ranges, changed in `sdn.data.images` only:
    image   float tensor (B, 3, H, W), RGB, in [-1, 1]
    pixels  uint8 array (H, W, 3) or tensor (B, 3, H, W), RGB, in 0..255

Importing this package needs torch, numpy and Pillow, and does nothing else.
"""

# Raised whenever the same config and data would give other results: it is part of every stage key.
METHOD_VERSION = 7

__all__ = ["METHOD_VERSION"]
