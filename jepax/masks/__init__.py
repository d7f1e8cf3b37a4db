"""Masks as token sets: index arrays of static length with validity, drawn per sample inside jit.

A sampler is a frozen dataclass, called as `sampler(keys, step_key) -> Masks`, that knows its
`context_size` and `target_size` before anything is traced.
"""

from jepax.masks.crop_blocks import CropBlocks
from jepax.masks.inverse_block import InverseBlock
from jepax.masks.multiblock import MultiBlock
from jepax.masks.random import Random
from jepax.masks.tokens import Masks, TokenSet, gather, to_bool

__all__ = [
  "CropBlocks",
  "InverseBlock",
  "Masks",
  "MultiBlock",
  "Random",
  "TokenSet",
  "gather",
  "to_bool",
]
