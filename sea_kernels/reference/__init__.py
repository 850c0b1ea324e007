"""Every public function in plain PyTorch: the specification in code.

The functions have the signatures and checks of those of :mod:`sea_kernels`, whatever the current backend is.
"""

from .. import backends
from .. import losses as public
from ..losses import SEALoss
from ..regions import Regions
from . import losses as specification
from .raster import mask_rasterizer, rasterizer

__all__ = [
    "Regions",
    "SEALoss",
    "anchor_cosine",
    "anchor_loss",
    "anchor_pool",
    "localization_alignment_loss",
    "sea_loss",
    "topological_distance_loss",
]

_BACKEND = backends.Backend(
    "reference",
    rasterizer,
    mask_rasterizer,
    specification.anchor_pool,
    specification.anchor_cosine,
    specification.losses,
)
backends.register(_BACKEND)

anchor_pool = backends.on(_BACKEND, public.anchor_pool)
anchor_cosine = backends.on(_BACKEND, public.anchor_cosine)
anchor_loss = backends.on(_BACKEND, public.anchor_loss)
topological_distance_loss = backends.on(_BACKEND, public.topological_distance_loss)
localization_alignment_loss = backends.on(_BACKEND, public.localization_alignment_loss)
sea_loss = backends.on(_BACKEND, public.sea_loss)
