"""Compare two profiles, metric by metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe2edge.errors import Inconclusive, InputError, Regressed
from moe2edge.evaluation.gate.rules import (
    HIGHER,
    PROCESS_MEMORY,
    QUALITY,
    TIMINGS,
    Gate,
    MetricRule,
)
from moe2edge.numerics.paired_changes import Judgement

COMPARISON_VERSION = 1
COMPARISON_KIND = "moe2edge.comparison"


@dataclass(frozen=True)
class MetricResult:
    """One metric on both sides.

    Attributes:
        name: of the metric.
        base: its value there; None: not known.
        head: likewise.
        change: relative change from base to head; None: one of them is not known, or zero.
        tolerance: fraction of base that does not count.
        judgement: what is said of it; None: nothing, see `note`.
        fails: whether a regression ends the command with an error.
        spread: ends of the interval of the change; None: it is no estimate.
        smallest_effect: change that would have been found, where there is noise in four of five
            cases; None: not known.
        note: why it was not compared, or what else there is to say.
    """

    name: str
    base: float | None
    head: float | None
    change: float | None
    tolerance: float
    judgement: Judgement | None
    fails: bool
    spread: tuple[float, float] | None = None
    smallest_effect: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "name": self.name,
            "base": self.base,
            "head": self.head,
            "change": self.change,
            "interval": list(self.spread) if self.spread else None,
            "tolerance": self.tolerance,
            "smallest_effect": self.smallest_effect,
            "judgement": self.judgement,
            "fails": self.fails,
            "note": self.note,
        }


@dataclass(frozen=True)
class GateResult:
    """All metrics of two sides.

    Attributes:
        base: name of that side.
        head: likewise.
        rows: the metrics.
        rounds: rounds of pairs that were run; 0: two files were compared.
        pairs: pairs of all rounds.
    """

    base: str
    head: str
    rows: tuple[MetricResult, ...]
    rounds: int = 0
    pairs: int = 0

    def list_names(self, judgement: Judgement, *, fails: bool = True) -> list[str]:
        """List the metrics with a judgement, of those that fail or those that only advise."""
        return [r.name for r in self.rows if r.judgement == judgement and r.fails == fails]

    @property
    def judgement(self) -> Judgement:
        """Judgement of the whole, by the metrics that fail."""
        for one in ("regressed", "inconclusive", "improved"):
            if self.list_names(one):
                return one
        return "equivalent"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "schema_version": COMPARISON_VERSION,
            "kind": COMPARISON_KIND,
            "base": self.base,
            "head": self.head,
            "rounds": self.rounds,
            "pairs": self.pairs,
            "judgement": self.judgement,
            "metrics": [row.to_json() for row in self.rows],
        }

    def check(self) -> None:
        """Let the gate fail.

        Raises:
            Regressed: a metric got worse by more than its tolerance; names all of them.
            Inconclusive: nothing can be said of one.
        """
        worse = [row for row in self.rows if row.judgement == "regressed" and row.fails]
        if worse:
            said = ", ".join(
                f"{r.name} {_say_change(r)} (tolerance {r.tolerance:.1%})" for r in worse
            )
            raise Regressed(f"{self.head} is worse than {self.base}: {said}")
        unknown = [r for r in self.rows if r.judgement == "inconclusive" and r.fails]
        if unknown:
            said = ", ".join(f"{r.name} ({r.note})" if r.note else r.name for r in unknown)
            remedies = []
            if any(row.spread for row in unknown):
                remedies.append("measure on a quieter machine, or take more --pairs")
            if not all(row.spread for row in unknown):
                remedies.append("measure both sides alike (an export with --eval none has no KL)")
            raise Inconclusive(
                f"nothing can be said of {said}; {'; '.join(remedies)}; or let the gate only "
                "advise on it"
            )


def _say_change(row: MetricResult) -> str:
    return f"{row.change:+.1%}" if row.change is not None else f"{row.base} to {row.head}"


def list_values(document: Mapping[str, Any]) -> dict[str, float | None]:
    """List the values of a profile by the names that rules have.

    Args:
        document: as `moe2edge.evaluation.profile.result.Profile.to_json` returns it.
    """
    found: dict[str, float | None] = {
        "folder": document["sizes"]["total"],
        "weights": document["sizes"]["weights"],
        "bytes_per_token": document["roofline"]["bytes_per_token"]["total"],
    }
    for phase in document["memory"]["phases"]:
        for kind in ("peak_rss", "rss_anon"):
            found[f"{kind}_{phase['phase']}"] = phase[kind]
        found[f"above_floor_{phase['phase']}"] = phase["above_floor"]["peak_rss"]
    found |= {name: document["quality"].get(name) for name in QUALITY}
    return found | {name: document["metrics"][name]["median"] for name in TIMINGS}


def compare_value(
    name: str, base: float | None, head: float | None, rule: MetricRule
) -> MetricResult:
    """Compare one metric that has no noise beyond its tolerance."""
    fails = rule.gate == "fail"
    if base is None and head is None:
        return MetricResult(
            name, None, None, None, rule.tolerance, None, fails, note="neither side has it"
        )
    if base is None or head is None:
        side = "base" if base is None else "head"
        return MetricResult(
            name, base, head, None, rule.tolerance, "inconclusive", fails, note=f"{side} lacks it"
        )
    worse = base - head if name in HIGHER else head - base
    allowed = max(rule.absolute, rule.tolerance * abs(base))
    judgement: Judgement = "equivalent"
    if abs(worse) > allowed:
        judgement = "regressed" if worse > 0 else "improved"
    if not base:
        return MetricResult(name, base, head, None, rule.tolerance, judgement, fails)
    part = allowed / abs(base)
    return MetricResult(
        name, base, head, head / base - 1, part, judgement, fails, smallest_effect=part
    )


def check_comparable(base: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Refuse profiles of different work.

    Raises:
        InputError: names what differs.
    """
    for name in sorted({*base["workload"], *head["workload"]} - {"processes"}):
        mine, other = base["workload"].get(name), head["workload"].get(name)
        if mine != other:
            raise InputError(
                f"base was measured with {name} {mine} and head with {other}; measure both with "
                "the same options of moe2edge profile, or compare the two folders"
            )


def compare_documents(
    base: Mapping[str, Any], head: Mapping[str, Any], gate: Gate, names: Sequence[str]
) -> GateResult:
    """Compare two profiles of the same work.

    Timings are advice alone; and on another machine so is the memory of whole processes, of which
    its libraries take another part.

    Args:
        base: the profile to compare with.
        head: the profile to judge.
        gate: the rules.
        names: of both.

    Raises:
        InputError: they are of different work.
    """
    check_comparable(base, head)
    values, elsewhere = (list_values(base), list_values(head)), _measured_elsewhere(base, head)
    rows = []
    for row in compare_fixed(base, head, gate):
        bound = elsewhere and row.name in PROCESS_MEMORY
        rows.append(replace(row, fails=False, note=elsewhere) if bound else row)
    note = elsewhere or _find_threads(base, head)
    for name in (name for name in TIMINGS if name in gate.metrics):
        rule = gate.metrics[name].model_copy(update={"gate": "advice"})
        mine, other = values[0][name], values[1][name]
        rows.append(
            MetricResult(name, mine, other, None, rule.tolerance, None, False, note=note)
            if note
            else compare_value(name, mine, other, rule)
        )
    return GateResult(names[0], names[1], tuple(rows))


def _measured_elsewhere(base: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    """Return a note if two profiles are of different machines; empty: they are of one."""
    hosts = [side["env"].get("host_fingerprint") for side in (base, head)]
    return "measured on different machines" if None in hosts or hosts[0] != hosts[1] else ""


def _find_threads(base: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    """Return a note if two profiles are of different threads; empty: of as many."""
    threads = [(side["env"].get("threads") or {}).get("runtime") for side in (base, head)]
    if threads[0] == threads[1]:
        return ""
    return f"measured with {threads[0]} and {threads[1]} threads"


def compare_fixed(
    base: Mapping[str, Any], head: Mapping[str, Any], gate: Gate
) -> Iterator[MetricResult]:
    """Compare all metrics of two profiles but timings."""
    mine, other = list_values(base), list_values(head)
    texts = [side["quality"].get("sha256") for side in (base, head)]
    for name, rule in gate.metrics.items():
        if name in TIMINGS:
            continue
        row = compare_value(name, mine.get(name), other.get(name), rule)
        if name in QUALITY and None not in texts and texts[0] != texts[1]:
            note = "measured on different texts"
            row = MetricResult(
                name, row.base, row.head, None, row.tolerance, "inconclusive", row.fails, note=note
            )
        yield row
