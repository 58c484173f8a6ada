"""From a student to faster, lossless decoding: sampling, verification, drafters, engine, benchmark, audit.

Importing the package imports none of its parts, so ``import spec`` stays free of torch.
"""

from __future__ import annotations
