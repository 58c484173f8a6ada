"""``python -m onpolicy.doctor``: preflight checks, seconds long, before hours are spent. See docs/doctor.md.

``findings`` what a finding is and how it is shown; ``text`` tokenizers, templates and lengths; ``teacher`` its weights
and scores; ``sampler`` whether the engine samples what is trained, ``delivery`` also after a sync; ``costs`` memory,
disk, licence; ``speed`` time; ``examination`` the order.
"""

from onpolicy.doctor.findings import Finding, Level, Report

__all__ = ["Finding", "Level", "Report"]
