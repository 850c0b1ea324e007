"""The native backend: operators, the compiled library that implements them, and their gradients."""

from .. import backends
from ..reference.raster import mask_rasterizer
from .autograd import anchor_cosine, anchor_pool, losses, rasterizer

backends.register(backends.Backend("native", rasterizer, mask_rasterizer, anchor_pool, anchor_cosine, losses))
