"""What an audit came to: a JSON object, a table, an exit status."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Answer = Literal["equivalent", "different", "undecided"]
EXIT = {"equivalent": 0, "different": 3, "undecided": 4}  # 2 is a user's mistake, 1 a crash


@dataclass(frozen=True)
class Fault:
    """The named wrong law that explains the text best."""

    name: str
    parameters: dict[str, Any]  # "share" of tokens so drawn, or "factor" of the temperature
    where: dict[str, Any] = field(default_factory=dict)  # position in block or request parameters it shows most in
    also: tuple[str, ...] = ()  # other laws that would have been shown alone, the best first: one fault has many signs


@dataclass(frozen=True)
class Verdict:
    """Of one engine.

    ``different`` is wrong with probability at most ``delta``, and so is ``equivalent`` (a mean shift along the declared
    directions of at most ``epsilon``, see :mod:`spec.audit.certificate`).
    """

    verdict: Answer
    engine: str
    mode: str
    delta: float
    tokens: int
    epsilon: float | None = None  # the bound reached; None in modes that have none
    wanted_epsilon: float | None = None
    fault: Fault | None = None
    floor: dict[str, float] | None = None  # the target against itself: see spec.audit.floor
    tests: dict[str, Any] = field(default_factory=dict)
    path: list[tuple[int, float]] = field(default_factory=list)  # tokens, log10 e
    histograms: dict[str, list[int]] = field(default_factory=dict)  # of the PIT, 32 bins
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def exit_status(self) -> int:
        return EXIT[self.verdict]

    def sentence(self) -> str:
        """One line for people."""
        if self.verdict == "different":
            why = f": {self.fault.name} {_brief(self.fault.parameters)}" if self.fault else ""
            why += f" (also: {', '.join(self.fault.also[:3])})" if self.fault and self.fault.also else ""
            return f"different from its target, shown after {self.tests.get('decided_at', self.tokens):,} tokens{why}"
        if self.verdict == "equivalent":
            bound = "" if self.epsilon is None else f" within {self.epsilon:.2%} a token"
            return f"equivalent to its target{bound}, after {self.tokens:,} tokens"
        bound = "" if self.epsilon is None else f" (a shift of up to {self.epsilon:.2%} a token is possible)"
        return f"undecided after {self.tokens:,} tokens{bound}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        """One object; no NaN, no infinity."""
        return json.dumps(self.as_dict(), allow_nan=False)


def _brief(parameters: dict[str, Any]) -> str:
    return " ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in
                    parameters.items())  # fmt: skip
