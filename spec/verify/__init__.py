"""Accept / residual / bonus: from target and draft probabilities to committed tokens, exactly as the target draws.

p is the target, q the draft (Leviathan et al. 2211.17192, Chen et al. 2302.01318), both *processed* by
:mod:`spec.sampling`. A request with drafted tokens x_1..x_K is committed x_1..x_tau and one more token y.

- ``token``: x_i is accepted with a_i = min(1, p_i(x_i) / q_i(x_i)), up to the first rejection;
  y ~ norm(max(p - q, 0)) at the rejected position, or the bonus y ~ p after all K.
- ``block`` (Sun et al. 2403.10444): w_0 = 1, w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i)); the prefix of length i passes
  with h_i = S_i / (S_i + 1 - w_i), S_i = sum_x max(w_i p_{i+1}(x) - q_{i+1}(x), 0), and h_K = w_K; tau is the longest
  prefix that passes; y ~ norm(max(w_tau p - q, 0)), or the bonus. Never fewer accepted tokens than ``token``.

Greedy needs no mode of its own: at temperature 0 the processed p is one-hot and both modes accept exactly the
argmax. :func:`verify_greedy` is that special case from argmax ids alone. A deterministic draft (argmax, n-gram
lookup) is q one-hot. q may be zero anywhere, p too.

What keeps the output exact is up to the drafter as well: whether x_i is drafted at all may depend on the committed
text and on x_1..x_{i-1}, never on x_i itself (drawing a token and dropping it because its q is low biases the rest).

Three backends give the same decisions from the same uniforms: ``reference`` (eager, one request at a time),
``numba`` (CPU) and ``torch`` (any device). :func:`laws` exposes what they decide by, for exact enumeration.
"""

from __future__ import annotations

from spec.verify.block import Backend, Drafts, Mode, Verdicts, length_law
from spec.verify.dispatch import laws, sample, verify, verify_greedy

__all__ = ["Backend", "Drafts", "Mode", "Verdicts", "laws", "length_law", "sample", "verify", "verify_greedy"]
