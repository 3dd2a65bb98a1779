"""Arrays with shapes in annotations (jaxtyping), which the tests check at each call of the modules that use them.

    def patchify(images: Shaped[AnyArray, 'batch height width channels'], patch: int) -> ...

Names stand for sizes that are equal within a call; '...' is any shape. Outside of the tests annotations cost nothing.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Int as Int
from jaxtyping import Key as Key
from jaxtyping import Shaped as Shaped

if TYPE_CHECKING:
  AnyArray = jax.Array
else:
  AnyArray = jax.Array | np.ndarray  # as any function of JAX, these take arrays of numpy too
