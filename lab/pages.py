# SPDX-License-Identifier: Apache-2.0
"""Fill what stands between the markers of READMEs and bundles' results.md with the rows of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.record import all_rows
from lab.score import METRICS

SHOWN = ("student_alone", "logits_kd", "distilled", "teacher")     # in the READMEs, in this order
TITLES = {                                                         # in the full tables, in this order
    "teacher": "teacher", "student_alone": "student alone", "logits_kd": "plain KD", "features_kd": "feature hints",
    "distilled": "distilled", "method": "method alone", "combined": "method and plain KD",
}


def readme_cell(content: Mapping[str, Any]) -> str:
    """Student alone / plain KD / distilled / teacher of every row, for a cell of a Markdown table."""
    return "<br>".join(f"{name}: {' / '.join(values)}" for name, *values in _main_values(content))


def summary_table(content: Mapping[str, Any]) -> str:
    """A line per row: the main metric of the networks that matter most."""
    rows = finished_rows(content)
    if not rows:
        return ""
    first = f"test {metric_title(rows[0]['metric'])}, {'higher' if rows[0]['higher_is_better'] else 'lower'} is better"
    return _markdown([first, *(TITLES[name] for name in SHOWN)], _main_values(content))


def full_tables(content: Mapping[str, Any]) -> str:
    """A table per row: every arm with all metrics."""
    return "\n\n".join(_row_table(row) for row in finished_rows(content))


def finished_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that have results; of others only a search is there."""
    return [row for row in all_rows(content) if "teacher" in row]


def _main_values(content: Mapping[str, Any]) -> list[list[str]]:
    return [[row["id"], *(_value(row.get(name)) for name in SHOWN)] for row in finished_rows(content)]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def _row_table(row: Mapping[str, Any]) -> str:
    chosen = row.get("distilled", {}).get("arm")
    arms = {**_arms(row), **row["ablations"]}
    found = sorted({name for arm in arms.values() for name in arm["metrics"]})
    metrics = sorted(found, key=lambda name: [*METRICS, name].index(name))     # those without a title last
    head = [row["id"], *(f"{split} {metric_title(row['metric'])}" for split in ("validation", "test"))]
    lines = []
    for name, arm in arms.items():
        title = _name(name, arm.get("candidate", "")) + (" (= distilled)" if name == chosen else "")
        values = [_number(arm["metrics"].get(metric)) for metric in metrics]
        lines.append([title, _value(arm["validation"]), _value(arm), *values])
    return f"{_markdown([*head, *map(metric_title, metrics)], lines)}\n\n{_sentence(row)}"


def _arms(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All arms of a row but `distilled`, which is one of them."""
    found = {name: row[name] for name in (*TITLES, *row) if name in row and name != "distilled"}
    return {name: arm for name, arm in found.items() if isinstance(arm, dict) and {"per_case", "validation"} <= {*arm}}


def _name(arm: str, candidate: str = "") -> str:
    return TITLES.get(arm, arm.replace("_", " ")) + (f" ({candidate})" if candidate else "")


def _sentence(row: Mapping[str, Any]) -> str:
    splits, gap, numbers = row["splits"], row.get("gap_recovered", {}), row.get("parameters", {})
    cases = f"{splits['training']} training, {splits['validation']} validation, {splits['test']} test cases"
    text = f"{cases}; seeds {', '.join(map(str, row['seeds']))} (mean ± sd)."
    if gap.get("value") is not None:
        bounds = "" if gap["low"] is None else f" (95 %: {100 * gap['low']:.0f} to {100 * gap['high']:.0f} %)"
        text += f" Gap recovered: {100 * gap['value']:.0f} %{bounds}."
    if gap.get("reason"):
        text += f" {gap['reason'][0].upper()}{gap['reason'][1:]}."
    if numbers:
        text += f" Teacher {numbers['teacher']:,} parameters, student {numbers['student']:,}; "
        text += "{teacher:.2f} and {student:.2f} s per case.".format(**row["seconds_per_case"])
    text += _calibrated(row)
    return f"{text}\n\n{_tried(row)}" if row.get("search") else text


def _calibrated(row: Mapping[str, Any]) -> str:
    """What was chosen on validation for each network, seed by seed."""
    chosen = {_name(name): arm["calibrated"] for name, arm in _arms(row).items() if "calibrated" in arm}
    if not chosen:
        return ""
    told = [
        f"{name} {', '.join(str(value) for one in seeds for value in one.values())}" for name, seeds in chosen.items()
    ]
    return f" Chosen on validation, `{next(iter(row['teacher']['calibrated'][0]))}`: {'; '.join(told)}."


def _tried(row: Mapping[str, Any]) -> str:
    """Everything that was trained with the first seed, by its validation score, best first."""
    scores = {
        _name(name, candidate): one["validation"]["runs"][0]
        for name, arm in _arms(row).items() if name != "teacher"
        for candidate, one in arm.get("candidates", {"": arm}).items()
    }
    scores |= {one["name"].replace("_", " "): one["validation"] for one in row["search"]}
    ordered = sorted(scores.items(), key=lambda item: item[1], reverse=row["higher_is_better"])
    head = ["first seed only", f"validation {metric_title(row['metric'])}"]
    return _markdown(head, [[name, f"{value:.3f}"] for name, value in ordered])


def metric_title(metric: str) -> str:
    """Title of a column with a metric."""
    return METRICS.get(metric, metric.removeprefix("val_").replace("_", " "))


def _value(arm: Mapping[str, Any] | None) -> str:
    if not arm:
        return "-"
    return f"{arm['mean']:.3f}" + (f" ± {arm['sd']:.3f}" if arm.get("sd") is not None else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def fill(content: Mapping[str, Any], readme: Path, bundle_page: Path) -> list[Path]:
    """Bring the project's README, a bundle's README and the results.md beside that up to date.

    Returns:
        Pages that have no markers.
    """
    texts = {
        readme: (f"<!-- results:{content['bundle']} -->", readme_cell(content)),
        bundle_page: ("<!-- results -->", f"\n{summary_table(content)}\n"),
        bundle_page.with_name("results.md"): ("<!-- results -->", f"\n{full_tables(content)}\n"),
    }
    missing = []
    for page, (begin, new) in texts.items():
        old = page.read_text() if page.exists() else ""
        before, _, rest = old.partition(begin)
        _, end, after = rest.partition("<!-- /results -->")
        if not end:
            missing.append(page)
        elif (text := before + begin + new + end + after) != old:
            page.write_text(text)
    return missing
