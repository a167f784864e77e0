"""Sites: the places in a language model's blocks where activations are read and replaced.

Blocks are counted from 0. At layer L:

    resid_pre    the residual stream that block L reads; for L = n_layers, the last block's output
    resid_post   the residual stream that block L returns, which is resid_pre of L + 1
    attn_out     what block L's attention adds to the stream
    mlp_out      what block L's MLP adds to the stream
"""

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from matryoshka.errors import UserError

Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]
SITES: tuple[Site, ...] = get_args(Site)

# A function from activations [batch, seq, d_model] to their replacements, of the same shape.
Replace = Callable[[Tensor], Tensor]


def check_site(layer: int, site: str, n_layers: int) -> None:
    """Raises `UserError` if a model of `n_layers` blocks does not have that site at that layer."""
    if site not in SITES:
        raise UserError(f"--site must be one of {', '.join(SITES)}, got {site}")
    last = n_layers if site == "resid_pre" else n_layers - 1
    if not isinstance(layer, int) or not 0 <= layer <= last:
        at = "" if site == "resid_pre" else f" with site {site}"
        raise UserError(f"layer {layer} is not there: this model has 0 to {last}{at}")
