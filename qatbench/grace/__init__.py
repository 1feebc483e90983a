"""GRACE (arXiv:2601.22709): distil a big frozen teacher into a fake-quantized student.

Objective per optimizer step, all terms over the whole step and not per micro-batch:

    L = CE + beta * GDKD + omega * RCKA
    GDKD = sum_i g_i d_i / sum_i g_i,      g_i = exp(-H_i / log V)
    d_i  = (a TCKD_i + b NCKD_i) T^2,      a = 1, b = 4, T = 2
    RCKA = mean over images of 1 - CKA(student tokens, teacher tokens)
    beta <- clip(beta + eta (EMA(GDKD) - tau), low, high)

Tensors only: which hidden states, which tokens and which step is the trainer's business.

Where paper and released code differ, or we depart from either:

1.  Supervised tokens by default (`tokens: supervised`). The paper distils every token (`tokens:
    all`: all text); the released code, and we, the supervised ones: memory, and the prompt is not
    what the student is asked to produce.
2.  The rest mass log(1 - p) is a masked logsumexp. The released code takes 1 - p in fp32 and clamps
    both sides at 1e-8: a student that gives target or rest less than that gets no gradient.
3.  V in the gate is the logits' own width, padding rows of the vocabulary included, as in the
    released code: how many rows are padding is not recorded, and log V hardly moves.
4.  The gate is taken at temperature 1 and carries no gradient; only d is softened by T.
5.  One gate-weighted mean over an optimizer step. The released loss divides within each call, so it
    depends on how the batch was cut into micro-batches; we expose numerator and denominator.
6.  Backward recomputes each chunk. The released code cuts the forward pass only: autograd keeps
    every chunk's fp32 intermediates, and the memory that was to be bounded grows with N.
7.  No supervised token raises, and an image without a defined CKA is None. The released code has 0
    for "none at all" in both cases, which an average then takes for perfect agreement.
8.  CKA counts as degenerate when a centred Gram's norm is below 1e-7 n; the released code compares
    the squared norm with 1e-8 whatever n is. Both agree at n = 1000; ours is one test for all n.
9.  Features are centred before their Gram is formed: the same number with less cancellation.
10. BetaController has no defaults; a recipe's `controller` is that of the launch script unless it
    says otherwise, since the paper's runs were started by it: tau 3.0, eta 0.003, beta 0.5 in [0.1,
    1.0] (`launch-script`). The released class says tau 0.35, eta 0.0015, beta 1.0 in [0.1, 5.0]
    (`class-defaults`). tau must fit the range that GDKD travels in a run: the report warns.
11. A saved controller state that is incomplete or out of bounds, and a loss that is not finite,
    raise. The released code keeps the old values; one nan pins its beta at the upper bound.
12. The projector is trained in 16 bit by default (`projector: trained`): no loader of GPTQ or AWQ
    checkpoints reads a packed one, and it holds under 1 % of the weights. `frozen` and `quantized`
    (on the grid while training, stored as 16-bit values) are there for comparison.
13. The log of a scale has no LSQ gradient factor by default (`scale_gradient: log`), as released.
14. Heads of teacher and student that are padded to different sizes are cut to the common rows.
"""

from __future__ import annotations

from qatbench.grace.controller import BetaController
from qatbench.grace.losses import (
    GatedSums,
    cross_entropy,
    cross_entropy_sum,
    gated_decoupled_kd,
    gated_decoupled_kd_sums,
    plain_kd,
    plain_kd_sum,
    relational_cka,
    teacher_gate,
)

__all__ = [
    "BetaController",
    "GatedSums",
    "cross_entropy",
    "cross_entropy_sum",
    "gated_decoupled_kd",
    "gated_decoupled_kd_sums",
    "plain_kd",
    "plain_kd_sum",
    "relational_cka",
    "teacher_gate",
]
