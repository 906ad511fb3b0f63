# SPDX-License-Identifier: Apache-2.0
"""Fill what stands between the markers of READMEs and bundles' results.md with the rows of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.record import all_rows, retention
from lab.score import AGREEMENT, METRICS

SHOWN = ("classical", "student_alone", "logits_kd", "distilled", "teacher")    # in the READMEs, in this order
RETENTION = "retention"
TITLES = {                                                         # in the full tables, in this order
    "classical": "classical",
    "teacher": "teacher", "student_alone": "student alone", "logits_kd": "plain KD", "features_kd": "feature hints",
    "distilled": "distilled", "method": "method alone", "combined": "method and plain KD",
}


def readme_cell(content: Mapping[str, Any]) -> str:
    """The values of `SHOWN` of every row, for a cell of a Markdown table, whose head names them for all bundles."""
    return "<br>".join(f"{name}: {' / '.join(values)}" for name, *values in _main_values(content, SHOWN))


def shown_columns(content: Mapping[str, Any]) -> list[str]:
    """Arms of a bundle's short table, and retention: only those that a row has, or `-` alone would stand there."""
    rows = main_rows(content)
    optional = {name: any(name in row for row in rows) for name in ("classical", RETENTION)}
    return [name for name in (*SHOWN, RETENTION) if optional.get(name, True)]


def summary_table(content: Mapping[str, Any]) -> str:
    """A line per row: the main metric of the networks that matter most."""
    rows = main_rows(content)
    if not rows:
        return ""
    first = f"test {metric_title(rows[0]['metric'])}, {'higher' if rows[0]['higher_is_better'] else 'lower'} is better"
    reasons = dict.fromkeys(row["not_rerun"] for row in rows if "not_rerun" in row)
    notes = [f"\n\nNot rerun: {reason}." for reason in reasons]
    head = [first, *(TITLES.get(name, name) for name in shown_columns(content))]
    return _markdown(head, _main_values(content, shown_columns(content))) + "".join(notes)


def full_tables(content: Mapping[str, Any]) -> str:
    """A table per row: every arm with all metrics."""
    return "\n\n".join(_row_table(row) for row in finished_rows(content))


def finished_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that have results; of others only a search is there."""
    return [row for row in all_rows(content) if "teacher" in row]


def main_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Finished rows without the details of others, for short tables and the figure."""
    return [row for row in finished_rows(content) if not row.get("detail")]


def _main_values(content: Mapping[str, Any], columns: Sequence[str]) -> list[list[str]]:
    return [[_row_name(row), *(_shown(row, name) for name in columns)] for row in main_rows(content)]


def _row_name(row: Mapping[str, Any]) -> str:
    """The id, with what a reader must not miss: that a row is old, did not converge or may not have, or has a leak."""
    warnings = [
        *(["not rerun"] if "not_rerun" in row else []),
        *(["not finished"] if "not_trained" in row else []),
        *(["not converged"] if row.get("converged", {}).get("reached") is False else []),
        *(["convergence unchecked"] if "regime" in row and "reached" not in row.get("converged", {}) else []),
        *(["leak"] if row.get("leaks", {}).get("verdict", "none").partition(":")[0] != "none" else []),
    ]
    return str(row["id"]) + (f" ({', '.join(warnings)})" if warnings else "")


def _shown(row: Mapping[str, Any], name: str) -> str:
    if name == RETENTION:
        return f"{100 * row[name]:.0f} %" if row.get(name) is not None else "-"
    return _value(row.get(name))


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def _row_table(row: Mapping[str, Any]) -> str:
    chosen = row.get("distilled", {}).get("arm")
    arms = {**_without_networks(row), **_arms(row), **row["ablations"]}
    found = sorted({name for arm in arms.values() for name in arm["metrics"]})
    metrics = sorted(found, key=lambda name: [*METRICS, name].index(name))     # those without a title last
    head = [row["id"], *(f"{split} {metric_title(row['metric'])}" for split in ("validation", "test"))]
    lines = []
    for name, arm in arms.items():
        title = _name(name, arm.get("candidate", "")) + (" (= distilled)" if name == chosen else "")
        values = [_number(arm["metrics"].get(metric)) for metric in metrics]
        lines.append([title, _validation(arm), _value(arm), *values])
    return f"{_markdown([*head, *map(metric_title, metrics)], lines)}\n\n{_sentence(row)}"


def _validation(arm: Mapping[str, Any]) -> str:
    """Score on the validation cases; where these have no label it is agreement with the teacher, which says less."""
    return _value(arm["validation"]) + _kind(arm)


def _kind(arm: Mapping[str, Any]) -> str:
    """What to say behind a validation score that is none by labels."""
    return " (agreement)" if arm["validation"].get("metric", "").endswith(AGREEMENT) else ""


def _arms(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All trained arms of a row but `distilled`, which is one of them."""
    found = {name: row[name] for name in (*TITLES, *row) if name in row and name not in ("distilled", "classical")}
    return {name: arm for name, arm in found.items() if isinstance(arm, dict) and {"per_case", "validation"} <= {*arm}}


def _without_networks(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The classical arm and the rules that ignore the image, as arms of a full table."""
    rules = {f"{name} (ignores the image)": one for name, one in row.get("leaks", {}).items() if name != "verdict"}
    found = {**({"classical": row["classical"]} if "classical" in row else {}), **rules}
    return {name: {**one, "validation": {"mean": one["validation"]}} for name, one in found.items()}


def _name(arm: str, candidate: str = "") -> str:
    return TITLES.get(arm, arm.replace("_", " ")) + (f" ({candidate})" if candidate else "")


def _sentence(row: Mapping[str, Any]) -> str:
    splits, gap, numbers = row["splits"], row.get("gap_recovered", {}), row.get("parameters", {})
    cases = f"{splits['training']} training, {splits['validation']} validation, {splits['test']} test cases"
    text = f"{cases}; seeds {', '.join(map(str, row['seeds']))} (mean ± sd; one seed where no ± stands)."
    text += _regime(row) + _steps(row) + _converged(row) + _borrowed(row)
    if gap.get("value") is not None:
        bounds = "" if gap["low"] is None else f" (95 %: {100 * gap['low']:.0f} to {100 * gap['high']:.0f} %)"
        size = abs(row["teacher"]["mean"] - row["student_alone"]["mean"])
        text += f" Gap recovered: {100 * gap['value']:.0f} % of {size:.3f}{bounds}."
    if gap.get("reason"):
        text += f" {_sentence_case(gap['reason'])}."
    if gains := [_gain(name, gain) for name, gain in row.get("gained", {}).items()]:
        text += f" Gain of the distilled over {', over '.join(gains)}."
    if row.get(RETENTION) is not None:
        alone = retention(row["student_alone"]["mean"], row["teacher"]["mean"], row["higher_is_better"])
        text += f" Retention: {100 * row[RETENTION]:.1f} %"
        text += "." if alone is None else f" (student alone: {100 * alone:.1f} %)."
    if numbers:
        text += f" Teacher {numbers['teacher']:,} parameters, student {numbers['student']:,}; "
        text += _seconds(row["seconds_per_case"])
    text += _calibrated(row)
    if missing := [*row.get("not_trained", ()), *_missing_points(row)]:
        text += f" Not trained: {'; '.join(missing).replace('_', ' ')}."
    if verdict := row.get("leaks", {}).get("verdict", ""):
        text += f" Leaks: {verdict.replace('_', ' ')}."
    return f"{text}\n\n{_tried(row)}" if row.get("search") else text


def _missing_points(row: Mapping[str, Any]) -> list[str]:
    """Networks that other points of a curve have, such as `plain KD with 2 labels`."""
    points = row.get("curve", {}).get("points", ())
    names = [name for name in ("student_alone", "logits_kd", "distilled") if any(name in point for point in points)]
    return [
        f"{TITLES[name]} with {point['labels']} label{'' if point['labels'] == 1 else 's'}"
        for point in points for name in names if name not in point and (point["labels"] or name != "student_alone")
    ]


def _gain(name: str, gain: Mapping[str, Any]) -> str:
    """Such as `plain KD +0.005 (95 %: -0.003 to +0.012)`."""
    bounds = "" if gain["low"] is None else f" (95 %: {gain['low']:+.3f} to {gain['high']:+.3f})"
    return f"{TITLES[name]} {gain['value']:+.3f}{bounds}"


def _regime(row: Mapping[str, Any]) -> str:
    if "regime" not in row:
        return f" {row['not_rerun'].capitalize()}." if "not_rerun" in row else ""
    told = row["regime"]
    labels, others = told["labels"], told["unlabeled"]
    text = f" Labels: {told['name']} ({labels} labeled cases and {others} images without a label"
    alone = told["labels_of_student_alone"]
    text += "" if alone == labels else f"; the student alone has {alone} labeled cases"
    text += f"; the teacher has {told['labels_of_teacher']}" if "labels_of_teacher" in told else ""
    text += ")."
    worth = row.get("labels_worth")
    if worth:
        bound = f"{'more' if 'more_than' in worth else 'fewer'} than {_bound(worth)}"
        number = f"about {worth['value']}" if worth.get("value") else bound
        text += f" Its teacher is worth {number} labeled cases: so many does a student alone need to be as good."
    return text


def _sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def _steps(row: Mapping[str, Any]) -> str:
    """Optimizer steps of the arms that a table shows, where they are known."""
    told = row.get("steps", {})
    known = [f"{TITLES[name]} {told[name]:,}" for name in TITLES if name in told]
    return f" Steps: {', '.join(known)}." if known else ""


def _bound(worth: Mapping[str, Any]) -> Any:
    return worth.get("more_than", worth.get("fewer_than", "any"))


def _converged(row: Mapping[str, Any]) -> str:
    """What twice the steps would have brought."""
    told = row.get("converged", {})
    parts = []
    others = (("plain KD", told.get("logits_kd", {})), ("teacher", told.get("teacher", {})))
    for name, one in (("student alone", told), *others):
        if one.get("validation_at_half") is not None:
            word = "converged" if one["reached"] else "NOT converged"
            parts.append(f"{name} {word} ({one['validation_at_half']:.3f} on validation after {one['steps_at_half']:,} "
                         f"steps, {one['validation']:.3f} after {one['steps']:,})")
    return f" {_sentence_case('; '.join(parts))}." if parts else ""


def _borrowed(row: Mapping[str, Any]) -> str:
    """Which arms are another bundle's, as their training is the same."""
    if "borrowed" not in row:
        return ""
    names = " and ".join(_name(name) for name in row["borrowed"]["arms"])
    return f" {_sentence_case(names)}: those of `{row['borrowed']['bundle']}`, whose training is the same."


def _seconds(seconds: Mapping[str, Any]) -> str:
    """Of a case, by stage; older results know the network's alone."""
    if "teacher" in seconds:
        return "{teacher:.2f} and {student:.2f} s per case.".format(**seconds)
    titles = {"network": "network", "network_openvino": "network with OpenVINO"}
    told = [
        f"{titles.get(stage, stage)} {one['teacher']:.3f} and {one['student']:.3f}" for stage, one in seconds.items()
    ]
    return f"s per case with one thread: {', '.join(told)}."


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
        for name, arm in _arms(row).items() if name != "teacher" and _is_comparable(arm, row)
        for candidate, one in arm.get("candidates", {"": arm}).items()
    }
    scores |= {one["name"].replace("_", " "): one["validation"] for one in row["search"]}
    ordered = sorted(scores.items(), key=lambda item: item[1], reverse=row["higher_is_better"])
    kind = _kind(row["distilled"]) if row.get("distilled") else ""
    head = ["first seed only", f"validation {metric_title(row['metric'])}{kind}"]
    return _markdown(head, [[name, f"{value:.3f}"] for name, value in ordered])


def _is_comparable(arm: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether an arm was validated as the distilled one was, by labels or by agreement."""
    return "metric" in arm["validation"] or "metric" not in row.get("distilled", arm)["validation"]


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
