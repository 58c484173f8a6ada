"""``python -m spec.bench``: how often drafts are accepted, what that buys on this machine, which draft length is best.

From prompts to a report, in the order of the modules:

- :mod:`spec.bench.prompts` reads a data set and applies the target's chat template;
- :mod:`spec.bench.counting` lets the engine write with the drafter and counts what was accepted, step by step;
- :mod:`spec.bench.replay` walks along the same text again and computes from full distributions what was to be expected;
- :mod:`spec.bench.costs` times drafting and verification, :mod:`spec.bench.speed` plain against speculative decoding;
- :mod:`spec.bench.figures` makes means and intervals of it; :mod:`spec.bench.results` is what the JSON file holds;
- :mod:`spec.bench.tables` and :mod:`spec.bench.web` show it.
"""
