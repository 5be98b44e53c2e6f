"""A profile as JUnit XML: one test case for each quantity, for systems that show such files."""

from __future__ import annotations

from xml.etree import ElementTree

from moe2edge.evaluation.profile.views.parts import Document, format_interval, list_profiles


def build_junit(document: Document) -> str:
    """Build the text of a document of one folder or of several.

    A quantity that is not known is skipped, with its reason. Nothing fails: a profile judges
    nothing.
    """
    root = ElementTree.Element("testsuites", name="moe2edge profile")
    for label, profile in list_profiles(document):
        suite = ElementTree.SubElement(root, "testsuite", name=_clean(label), failures="0")
        for name, metric in profile["metrics"].items():
            case = ElementTree.SubElement(suite, "testcase", name=name, classname=_clean(label))
            if not metric["samples"]:
                ElementTree.SubElement(case, "skipped", message=_clean(str(metric["reason"])))
                continue
            values = ElementTree.SubElement(case, "properties")
            for key in ("unit", "n", "median", "p90", "p95", "p99", "min", "max"):
                ElementTree.SubElement(values, "property", name=key, value=str(metric[key]))
            interval = format_interval(metric)
            ElementTree.SubElement(values, "property", name="ci95", value=interval)
            text = f"{metric['median']} {metric['unit']} (median of {metric['n']})"
            ElementTree.SubElement(case, "system-out").text = text
        if profile["warnings"]:
            text = "\n".join(_clean(warning) for warning in profile["warnings"])
            ElementTree.SubElement(suite, "system-err").text = text
        skipped = sum(not metric["samples"] for metric in profile["metrics"].values())
        suite.set("tests", str(len(profile["metrics"])))
        suite.set("skipped", str(skipped))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _clean(text: str) -> str:
    """Return text without the control characters that XML cannot hold."""
    return "".join(c if c >= " " and c not in "\ufffe\uffff" else " " for c in text)
