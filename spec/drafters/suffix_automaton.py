"""Suffix automaton of a growing text, compiled by numba (Blumer et al. 1985; online construction, amortised O(1)).

A state stands for the substrings that end at the same places of the text; its longest has LENGTH tokens and occurs
COUNT times, the last time ending at LATEST. Its suffix link leads to the longest suffix that also ends elsewhere. A
text of L tokens has at most 2 L states and 3 L edges.

COUNT and LATEST are brought up to date along the suffix links of every new token, at most ``_DEPTH`` of them, so that
a token's cost stays bounded on texts like "aaaa...". Beyond that depth (short suffixes of a very repetitive text) the
numbers of earlier tokens stand: such a suffix is still one that occurs, only its rank is rough.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from spec.drafters.lookup import grown

SEPARATOR = -1  # between texts: part of no match and never proposed
_jit = numba.njit(cache=True, nogil=True)
_DEPTH = 64
_LENGTH, _LINK, _COUNT, _LATEST, _EDGES = range(5)  # columns of states; _EDGES: the first of its edges, or -1
_SOURCE, _TOKEN, _TARGET, _NEXT = range(4)  # columns of edges; _NEXT: the source's next edge, or -1
_STATES_USED, _EDGES_USED, _LAST, _TEXT = range(4)  # entries of sizes; _LAST: the state of the whole text


class Match(NamedTuple):
    """Where a text is in the automaton."""

    state: int
    length: int  # tokens matched, 0 for none


class SuffixAutomaton:
    """Substrings of a text with their counts."""

    def __init__(self, capacity: int = 64) -> None:
        self._states = np.empty((2 * capacity + 2, 5), dtype=np.int32)
        self._edges = np.empty((3 * capacity + 3, 4), dtype=np.int32)
        self._states[0] = (0, -1, 0, -1, -1)
        self._sizes = np.array([1, 0, 0, 0], dtype=np.int64)
        self._new_table()

    def __len__(self) -> int:
        return int(self._sizes[_TEXT])

    def extend(self, tokens: np.ndarray) -> None:
        """[T] int64 tokens that follow the text; :data:`SEPARATOR` ends one text and begins another."""
        length = len(self) + len(tokens)
        if 2 * length + 2 > len(self._states):
            self._states = grown(self._states, 2 * length + 2)
            self._edges = grown(self._edges, 3 * length + 3)
            self._new_table()
        _extend(self._states, self._edges, self._table, self._sizes, tokens)

    def repeated_suffix(self) -> Match:
        """The longest suffix of the text that occurs earlier in it too."""
        state = int(self._states[self._sizes[_LAST], _LINK])
        return Match(state, int(self._states[state, _LENGTH])) if state > 0 else Match(0, 0)

    def match(self, tokens: np.ndarray) -> Match:
        """The longest suffix of other [T] int64 ``tokens`` that occurs in the text."""
        return Match(*_match(self._states, self._edges, self._table, tokens))

    def continuation(self, match: Match, limit: int, min_share: float) -> tuple[np.ndarray, float]:
        """What most often follows a match, token by token, [K] with K <= limit, and its sum of shares.

        A token's share is how often it was the one that followed, of all times the string before it was followed by
        anything, times the share of the token before it; their sum estimates how many will be accepted (the score of
        2411.04975). Of equally frequent tokens the most recent is taken. At the end of the text the walk goes on from
        the longest suffix that has a continuation. It ends before the share falls below ``min_share``.
        """
        out = np.empty(limit, dtype=np.int64)
        count, expected = _continue(self._states, self._edges, match.state, min_share, out)
        return out[:count], expected

    def _new_table(self) -> None:
        """Edges by source and token. At most half full, because a text can use all rows of ``_edges``."""
        self._table = np.full(1 << (2 * len(self._edges) - 1).bit_length(), -1, dtype=np.int32)
        _fill_table(self._edges, self._sizes[_EDGES_USED], self._table)


@_jit
def _extend(states, edges, table, sizes, tokens):  # type: ignore[no-untyped-def]
    for token in tokens:
        _append(states, edges, table, sizes, token)


@_jit
def _append(states, edges, table, sizes, token):  # type: ignore[no-untyped-def]
    before, position = sizes[_LAST], sizes[_TEXT]
    new = _new_state(states, sizes, states[before, _LENGTH] + 1)
    source, edge = before, -1
    while source >= 0:
        edge = _find(edges, table, source, token)
        if edge >= 0:
            break
        _new_edge(states, edges, table, sizes, source, token, new)
        source = states[source, _LINK]
    if source < 0:
        states[new, _LINK] = 0
    else:
        follower = edges[edge, _TARGET]
        if states[follower, _LENGTH] != states[source, _LENGTH] + 1:
            follower = _split(states, edges, table, sizes, source, token, follower)
        states[new, _LINK] = follower
    sizes[_LAST], sizes[_TEXT] = new, position + 1
    _count_suffixes(states, new, position)


@_jit
def _split(states, edges, table, sizes, source, token, whole):  # type: ignore[no-untyped-def]
    """The suffixes of state ``whole`` that are no longer than source + token end at one more place: their own state."""
    part = _new_state(states, sizes, states[source, _LENGTH] + 1)
    states[part, _LINK] = states[whole, _LINK]
    states[part, _COUNT], states[part, _LATEST] = states[whole, _COUNT], states[whole, _LATEST]
    edge = states[whole, _EDGES]
    while edge >= 0:
        _new_edge(states, edges, table, sizes, part, edges[edge, _TOKEN], edges[edge, _TARGET])
        edge = edges[edge, _NEXT]
    states[whole, _LINK] = part
    while source >= 0:
        edge = _find(edges, table, source, token)
        if edges[edge, _TARGET] != whole:
            break
        edges[edge, _TARGET] = part
        source = states[source, _LINK]
    return part


@_jit
def _count_suffixes(states, state, position):  # type: ignore[no-untyped-def]
    for _ in range(_DEPTH):
        if state <= 0:
            break
        states[state, _COUNT] += 1
        states[state, _LATEST] = position
        state = states[state, _LINK]


@_jit
def _match(states, edges, table, tokens):  # type: ignore[no-untyped-def]
    state, length = 0, 0
    for token in tokens:
        edge = _find(edges, table, state, token)
        while edge < 0 and state > 0:
            state = states[state, _LINK]
            length = states[state, _LENGTH]
            edge = _find(edges, table, state, token)
        if edge >= 0:
            state, length = edges[edge, _TARGET], length + 1
    return state, length


@_jit
def _continue(states, edges, state, min_share, out):  # type: ignore[no-untyped-def]
    share, expected = 1.0, 0.0
    for i in range(len(out)):
        while states[state, _EDGES] < 0:  # the end of the text
            state = states[state, _LINK]
            if state <= 0:
                return i, expected
        edge, followed = _most_frequent(states, edges, state)
        share *= states[edges[edge, _TARGET], _COUNT] / followed
        if edges[edge, _TOKEN] == SEPARATOR or share < min_share:
            return i, expected
        out[i] = edges[edge, _TOKEN]
        expected += share
        state = edges[edge, _TARGET]
    return len(out), expected


@_jit
def _most_frequent(states, edges, state):  # type: ignore[no-untyped-def]
    """The edge followed most often, the latest of equals, and how often any was followed."""
    edge = best = states[state, _EDGES]
    total = 0
    while edge >= 0:
        target, leader = edges[edge, _TARGET], edges[best, _TARGET]
        count, most = states[target, _COUNT], states[leader, _COUNT]
        total += count
        if count > most or (count == most and states[target, _LATEST] > states[leader, _LATEST]):
            best = edge
        edge = edges[edge, _NEXT]
    return best, total


@_jit
def _new_state(states, sizes, length):  # type: ignore[no-untyped-def]
    state = sizes[_STATES_USED]
    sizes[_STATES_USED] += 1
    states[state, _LENGTH], states[state, _LINK] = length, 0
    states[state, _COUNT], states[state, _LATEST], states[state, _EDGES] = 0, -1, -1
    return state


@_jit
def _new_edge(states, edges, table, sizes, source, token, target):  # type: ignore[no-untyped-def]
    edge = sizes[_EDGES_USED]
    sizes[_EDGES_USED] += 1
    edges[edge, _SOURCE], edges[edge, _TOKEN], edges[edge, _TARGET] = source, token, target
    edges[edge, _NEXT] = states[source, _EDGES]
    states[source, _EDGES] = edge
    table[_slot(edges, table, source, token)] = edge


@_jit
def _find(edges, table, source, token):  # type: ignore[no-untyped-def]
    """The edge of ``source`` with ``token``, or -1."""
    return table[_slot(edges, table, source, token)]


@_jit
def _slot(edges, table, source, token):  # type: ignore[no-untyped-def]
    """The slot that holds the edge, or the free one where it belongs (linear probing). int64 arithmetic wraps."""
    mask = len(table) - 1
    mixed = ((np.int64(source) << 32) ^ np.int64(token)) * 0x2545F4914F6CDD1D
    slot = (mixed ^ (mixed >> 29) ^ (mixed >> 47)) & mask
    while table[slot] >= 0:
        edge = table[slot]
        if edges[edge, _SOURCE] == source and edges[edge, _TOKEN] == token:
            break
        slot = (slot + 1) & mask
    return slot


@_jit
def _fill_table(edges, used, table):  # type: ignore[no-untyped-def]
    for edge in range(used):
        table[_slot(edges, table, edges[edge, _SOURCE], edges[edge, _TOKEN])] = edge
