"""A profile as Markdown, for a comment on a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe2edge.evaluation.profile.views.charts import format_value
from moe2edge.evaluation.profile.views.parts import Document, format_quality, list_profiles

# By it a bot finds its own comment, to edit it.
COMMENT_MARKER = "<!-- moe2edge-profile -->"
_MIB = 2**20


def build_markdown(document: Document) -> str:
    """Build the text of a document of one folder or of several; details are folded up."""
    found = list_profiles(document)
    labels, profiles = [label for label, _ in found], [profile for _, profile in found]
    lines = [COMMENT_MARKER, "### moe2edge profile", ""]
    heads = [f"{_clean(label)} ({p['artifact'].get('target') or 'source'})"
             for label, p in zip(labels, profiles, strict=True)]  # fmt: skip
    lines += _build_table(["", *heads, "unit"], _list_rows(document, profiles, labels))
    for label, profile in zip(labels, profiles, strict=True):
        lines += [f"> {_clean(label)}: {_clean(text)}" for text in profile["warnings"]]
        lines += ["", "<details>", f"<summary>{_clean(label)}: details</summary>", ""]
        lines += _build_table(["kind", "decode, %"], _list_kinds(profile))
        quality = profile["quality"]
        told = quality["reason"] or (
            f"perplexity {format_quality(quality, 'perplexity')}, "
            f"KL {format_quality(quality, 'kl')}, top-1 {format_quality(quality, 'top1')} "
            f"on {quality['text']} ({quality['origin']})"
        )
        env = profile["env"]
        lines += ["", f"Quality: {_clean(told)}", "",
                  f"Machine: {_clean(str(env['cpu']['model']))}, {env['cpu']['usable']} cores, "
                  f"fingerprint {env.get('host_fingerprint')}", "</details>"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _list_rows(
    document: Document, profiles: Sequence[Document], labels: Sequence[str]
) -> list[list[str]]:
    """Return a row for each quantity: medians, and ratios to the first."""
    ratios = document.get("ratios") or {}
    rows = []
    for name, metric in profiles[0]["metrics"].items():
        medians = [profile["metrics"][name]["median"] for profile in profiles]
        rows.append([name, *_add_ratios(name, medians, labels, ratios), metric["unit"]])
    for n, phase in enumerate(profiles[0]["memory"]["phases"]):
        peaks = [profile["memory"]["phases"][n]["peak_rss"] for profile in profiles]
        name = f"peak_rss_{phase['phase']}"
        sizes = [None if peak is None else peak / _MIB for peak in peaks]
        rows.append([name, *_add_ratios(name, sizes, labels, ratios), "MiB"])
    weights = [profile["sizes"]["weights"] / _MIB for profile in profiles]
    rows.append(["weights", *_add_ratios("weights", weights, labels, ratios), "MiB"])
    reached = [format_value(profile["roofline"]["reached_pct"]) for profile in profiles]
    return [*rows, ["reached_pct", *reached, "%"]]


def _add_ratios(
    name: str,
    values: Sequence[float | None],
    labels: Sequence[str],
    ratios: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> list[str]:
    cells = [format_value(values[0])]
    for label, value in zip(labels[1:], values[1:], strict=True):
        ratio = ratios.get(label, {}).get(name)
        shown = f" (x{ratio['median']:.2f})" if ratio else ""
        cells.append(format_value(value) + shown)
    return cells


def _list_kinds(profile: Document) -> list[list[str]]:
    for phase in profile["breakdown"].get("phases") or ():
        if phase["phase"] == "decode" and phase["ms"]:
            return [[k, f"{100 * ms / phase['ms']:.1f}"] for k, ms in phase["by_kind"].items()]
    return [["not known", _clean(str(profile["breakdown"]["reason"]))]]


def _build_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(row)} |" for row in (heads, ruler, *rows)]


def _clean(text: str) -> str:
    """Return text that ends no cell and begins no tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
