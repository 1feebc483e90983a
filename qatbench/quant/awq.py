"""Two things that this project changes in gptqmodel's AWQ, both in what its searches look at.

Left alone, the library searches scales and clips on the last calibration batch only, as batches
of unlike length cannot be put together, and its clip search forms every group's products one by
one. Here every sample has its say, and the clip error is taken from the group's Gram matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKENS = 2048  # rows, spread over all samples, for the searches that need no whole sequence
NEEDS_SEQUENCE = ("q_proj",)  # the library looks up the input of attention under this name


def token_policy(name: str) -> dict[str, Any] | None:
    """Which calibration rows the library keeps of a linear's input; its own extension point.

    The scales before attention are judged by attention's output, hence on whole sequences: None,
    the last batch. All others are judged row by row, on `TOKENS` rows spread over all batches.
    """
    if name.endswith(NEEDS_SEQUENCE):
        return None
    return {"mode": "token_rows", "max_tokens": TOKENS}


@torch.inference_mode()
def clip_bounds(
    self: Any,
    w: Tensor,
    input_feat: Tensor,
    n_grid: int = 20,
    max_shrink: float = 0.5,
    n_sample_token: int = 0,
) -> Tensor:
    """Bounds that minimise each group's output error, as `AWQProcessor._compute_best_clip` does.

    The library's objective, mean over rows of (x_g . (clipped - w)_g)^2, equals d G d with
    d = clipped - w and G the mean of x_g x_g^T: the cost no longer depends on the rows, so all
    of them count (`n_sample_token` is the library's and has no use here).

    Args:
        self: the library's processor, which quantizes the clipped weights.
        w: (out, in) weight.
        input_feat: (..., in) calibration rows.
        n_grid: ratios are 1, 1 - 1/n_grid, ...
        max_shrink: ... down to 1 - max_shrink, left out.
        n_sample_token: unused.

    Returns: (out, groups, 1) bounds, in w's dtype.
    """
    out, width = w.shape
    size = self.qcfg.group_size if self.qcfg.group_size > 0 else width
    rows = input_feat.reshape(-1, width // size, size).to(w.device).float().transpose(0, 1)
    gram = rows.transpose(1, 2) @ rows / rows.shape[1]
    groups = w.reshape(out, width // size, size)
    whole = groups.abs().amax(dim=-1, keepdim=True)
    quantized = torch.empty_like(groups)
    bounds, errors = [whole], [torch.full_like(whole, torch.inf, dtype=torch.float32)]
    for step in range(int(max_shrink * n_grid)):
        bound = whole * (1 - step / n_grid)
        clipped = torch.clamp(groups, -bound, bound)
        self._pseudo_quantize_tensor_into(clipped, quantized, abs_max=bound)
        change = (quantized - groups).float().transpose(0, 1)
        errors.append(((change @ gram) * change).sum(-1).t().unsqueeze(-1))
        bounds.append(bound)
    best = torch.stack(errors).nan_to_num(nan=torch.inf).argmin(dim=0, keepdim=True)
    return torch.stack(bounds).gather(0, best).squeeze(0)
