"""The bound that memory sets on decoding: bandwidth over the bytes that a token reads."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Roofline:
    """Bytes that a token reads, and the rate of tokens that memory allows.

    Attributes:
        reads: bytes of weights that a token reads, by kind; None: not known.
        cache: bytes of the cache of keys and values at the end of the text; None: not known.
        context: tokens of that text.
        rates: bytes per second that the threads of the runtime read, of each process.
        threads: their number.
        array_bytes: size of the array that they read.
        decode_tok_s: measured rate; None: not measured.
        reason: why something is None.
    """

    reads: Mapping[str, int] | None
    cache: int | None
    context: int
    rates: tuple[float, ...]
    threads: int | None
    array_bytes: int | None
    decode_tok_s: float | None
    reason: str | None = None

    @property
    def bytes_per_token(self) -> int | None:
        """Bytes of weights and cache that a token at the end of the text reads.

        Without the cache where its size is not known, which `reason` then says.
        """
        return None if self.reads is None else sum(self.reads.values()) + (self.cache or 0)

    @property
    def bandwidth(self) -> float | None:
        """Median of the bytes per second over the processes."""
        return statistics.median(self.rates) if self.rates else None

    @property
    def ceiling_tok_s(self) -> float | None:
        """Tokens per second if memory were read at full bandwidth and nothing else took time."""
        if not self.bytes_per_token or self.bandwidth is None:
            return None
        return self.bandwidth / self.bytes_per_token

    @property
    def reached(self) -> float | None:
        """Percentage of the ceiling that was measured."""
        if self.ceiling_tok_s is None or self.decode_tok_s is None:
            return None
        return 100 * self.decode_tok_s / self.ceiling_tok_s

    def to_json(self) -> dict[str, Any]:
        """Return bytes, bandwidth, ceiling and percentage as JSON values."""
        known = self.bytes_per_token is not None and self.decode_tok_s is not None
        return {
            "bytes_per_token": {
                "unit": "bytes",
                "total": self.bytes_per_token,
                "kinds": None if self.reads is None else {**self.reads, "kv_cache": self.cache},
                "context": self.context,
            },
            "bandwidth": {
                "unit": "bytes/s",
                "median": self.bandwidth,
                "samples": list(self.rates),
                "threads": self.threads,
                "array_bytes": self.array_bytes,
            },
            "achieved_bytes_s": (
                self.decode_tok_s * (self.bytes_per_token or 0)
                if known and self.decode_tok_s is not None
                else None
            ),
            "ceiling_tok_s": self.ceiling_tok_s,
            "reached_pct": self.reached,
            "reason": self.reason,
        }


def make_roofline(
    reads: tuple[Mapping[str, int] | None, str | None],
    replies: Sequence[Mapping[str, Any]],
    decode_tok_s: float | None,
    workload: Mapping[str, Any],
) -> Roofline:
    """Make the roofline of one folder from the replies of the processes.

    Args:
        reads: bytes of weights that a token reads by kind, or None and the reason.
        replies: as `moe2edge.evaluation.profile.child.measure_once` returns them.
        decode_tok_s: median of the measured rate.
        workload: `ProfileSettings.describe`.
    """
    found, reason = reads
    rates = [reply["bandwidth"] for reply in replies if reply.get("bandwidth")]
    cache = replies[0].get("cache_bytes")
    reasons = [reason] if reason else []
    if cache is None:
        reasons.append("the runtime does not tell the bytes of its cache, which are left out")
    if not rates:
        reasons.append("the bandwidth of memory was not measured")
    if decode_tok_s is None:
        reasons.append("one token per prompt was generated; it takes at least two")
    return Roofline(
        found,
        cache,
        workload["prompt_tokens"] + workload["gen_tokens"] - 1,
        tuple(rate["bytes_per_s"] for rate in rates),
        rates[0]["threads"] if rates else None,
        rates[0]["array_bytes"] if rates else None,
        decode_tok_s,
        "; ".join(reasons) or None,
    )
