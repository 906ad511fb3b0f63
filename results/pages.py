# SPDX-License-Identifier: Apache-2.0
"""Fill what stands between markers of the READMEs with the rows of the results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from record import ARMS, all_rows

__all__ = ["bundle_table", "fill", "readme_cell", "write_between"]

TITLES = {
    "teacher": "teacher", "student_alone": "student alone", "logits_kd": "plain KD", "features_kd": "feature hints",
    "distilled": "distilled", "method": "method alone", "combined": "method and plain KD",
}
METRICS = {
    "val_mean_dice": "Dice", "val_hd95": "HD95", "val_assd": "ASSD", "val_surface_dice": "surface Dice",
    "val_wrong_components": "wrong components", "val_wrong_volume": "wrong volume",
    "val_voi": "VOI", "val_voi_split": "VOI split", "val_voi_merge": "VOI merge", "val_arand": "ARAND", "val_pq": "PQ",
    "val_aji": "AJI", "val_sbd": "SBD", "val_dic": "\\|DiC\\|",
}


def readme_cell(content: Mapping[str, Any]) -> str:
    """Student alone / plain KD / distilled / teacher of every row, for a cell of a Markdown table."""
    names = ("student_alone", "logits_kd", "distilled", "teacher")
    rows = [row for row in all_rows(content) if "teacher" in row]
    return "<br>".join(f"{row['id']}: " + " / ".join(_value(row.get(name)) for name in names) for row in rows)


def bundle_table(content: Mapping[str, Any]) -> str:
    """A table per row: every arm with all metrics."""
    parts = [_row_table(row) for row in all_rows(content) if "teacher" in row]
    return "\n\n".join(parts)


def _row_table(row: Mapping[str, Any]) -> str:
    splits = row["splits"]
    arms = {name: row[name] for name in (*ARMS[:-1], "method", "combined") if name in row}
    arms |= {name: row[name] for name in row if _is_arm(row[name]) and name not in (*arms, "distilled")}
    titles = {name: TITLES.get(name, name.replace("_", " ")) for name in (*arms, *row["ablations"])}
    chosen = row.get("distilled", {}).get("arm")
    if chosen:
        titles[chosen] += " (= distilled)"
    if "candidate" in row.get("logits_kd", {}):
        titles["logits_kd"] += f" ({row['logits_kd']['candidate']})"
    arms |= row["ablations"]
    metrics = sorted({name for arm in arms.values() for name in arm["metrics"]}, key=_order)
    head = [row["id"], f"validation {_title(row['metric'])}", f"test {_title(row['metric'])}", *map(_title, metrics)]
    lines = [head, ["---"] * len(head)]
    for name, arm in arms.items():
        values = [_number(arm["metrics"].get(metric)) for metric in metrics]
        lines.append([titles[name], _value(arm["validation"]), _value(arm), *values])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{_sentence(row, splits)}"


def _sentence(row: Mapping[str, Any], splits: Mapping[str, Any]) -> str:
    gap, numbers, seconds = row.get("gap_recovered", {}), row.get("parameters", {}), row.get("seconds_per_case", {})
    cases = f"{splits['training']} training, {splits['validation']} validation, {splits['test']} test cases"
    text = f"{cases}; seeds {', '.join(map(str, row['seeds']))} (mean ± sd)."
    if gap.get("value") is not None:
        bounds = "" if gap["low"] is None else f" (95 %: {100 * gap['low']:.0f} to {100 * gap['high']:.0f} %)"
        text += f" Gap recovered: {100 * gap['value']:.0f} %{bounds}."
    if gap.get("reason"):
        text += f" {gap['reason'][0].upper()}{gap['reason'][1:]}."
    if numbers:
        text += f" Teacher {numbers['teacher']:,} parameters, student {numbers['student']:,}; "
        text += f"{seconds['teacher']:.2f} and {seconds['student']:.2f} s per case."
    text += _calibrated(row)
    return f"{text}\n\n{_tried(row)}" if row.get("search") else text


def _calibrated(row: Mapping[str, Any]) -> str:
    """What was chosen on validation for each network, seed by seed."""
    arms = {name: row[name]["calibrated"] for name in row if _is_arm(row[name]) and "calibrated" in row[name]}
    told = [
        f"{TITLES.get(name, name)} {', '.join(str(value) for one in chosen for value in one.values())}"
        for name, chosen in arms.items() if name != "distilled"
    ]
    return f" Chosen on validation, `{next(iter(arms['teacher'][0]))}`: {'; '.join(told)}." if told else ""


def _tried(row: Mapping[str, Any]) -> str:
    """Everything that was trained with the first seed, by its validation score, best first."""
    others = ("teacher", "distilled", "logits_kd")
    arms = {name: row[name] for name in row if _is_arm(row[name]) and name not in others}
    scores = {TITLES.get(name, name): arm["validation"]["runs"][0] for name, arm in arms.items()}
    plain = row.get("logits_kd", {})
    for name, one in plain.get("candidates", {"": plain} if plain else {}).items():
        scores[f"{TITLES['logits_kd']} ({name})" if name else TITLES["logits_kd"]] = one["validation"]["runs"][0]
    scores |= {one["name"].replace("_", " "): one["validation"] for one in row["search"]}
    lines = [f"| first seed only | validation {_title(row['metric'])} |", "| --- | --- |"]
    ordered = sorted(scores.items(), key=lambda item: item[1], reverse=row["higher_is_better"])
    return "\n".join(lines + [f"| {name} | {value:.3f} |" for name, value in ordered])


def _is_arm(value: Any) -> bool:
    return isinstance(value, dict) and "per_case" in value and "validation" in value


def _order(name: str) -> tuple[int, str]:
    return (list(METRICS).index(name), "") if name in METRICS else (len(METRICS), name)


def _title(name: str) -> str:
    return METRICS.get(name, name.removeprefix("val_").replace("_", " "))


def _value(arm: Mapping[str, Any] | None) -> str:
    if not arm:
        return "-"
    return f"{arm['mean']:.3f}" + (f" ± {arm['sd']:.3f}" if arm.get("sd") is not None else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def write_between(text: str, begin: str, end: str, new: str) -> str:
    """Replace what stands between two markers; a text without them stays as it is.

    Example:
        >>> write_between("a <!-- x -->old<!-- /x --> b", "<!-- x -->", "<!-- /x -->", "new")
        'a <!-- x -->new<!-- /x --> b'
    """
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
    return pattern.sub(lambda found: found[1] + new + found[2], text, count=1)


def fill(content: Mapping[str, Any], readme: Path, bundle_page: Path) -> list[Path]:
    """Bring both pages up to date.

    Returns:
        Pages that have no markers.
    """
    texts = {
        readme: (f"<!-- results:{content['bundle']} -->", "<!-- /results -->", readme_cell(content)),
        bundle_page: ("<!-- results -->", "<!-- /results -->", f"\n{bundle_table(content)}\n"),
    }
    missing = []
    for page, (begin, end, new) in texts.items():
        old = page.read_text() if page.exists() else ""
        if begin not in old:
            missing.append(page)
        elif (text := write_between(old, begin, end, new)) != old:
            page.write_text(text)
    return missing
