"""The report's section on judges: rates by each, how often humans agree, and what chose training
data."""

from fedsafe_jax.cai.revise import parse_check
from fedsafe_jax.evals import two_sides
from fedsafe_jax.evals.judges import JUDGES
from fedsafe_jax.evals.task import UNDEFINED, Column
from fedsafe_jax.report.blocks import Section, Table, Text
from fedsafe_jax.report.run_data import RunData

QUALITIES = ("agreement", "precision", "recall", "false_alarms")
CORRECTED = (
    "Corrected rates allow for what a judge misses and falsely finds on answers that humans have "
    "labelled (below); their interval spans all labelled models, as it is not known which of them "
    "this run's answers are like."
)


def sections(run: RunData) -> list[Section]:
    """Returns a table of the rates by judge for every pair of tasks that are shown together."""
    tables = [_table(run, name, beside) for name, beside in two_sides.pairs(run.sets)]
    blocks = [table for table in tables if table.rows]
    if not blocks:
        return []
    blocks += _calibration(run)
    return [Section("Judges", [Text(_signals(run.config)), *blocks])]


def _calibration(run: RunData) -> list[Text | Table]:
    """Returns how far judges agree with human labels, by model, and what is not corrected."""
    rows = [
        (judge, model, q["n"], q["refusals"], *(_share(q[name]) for name in QUALITIES))
        for judge, models in run.results.get("calibration", {}).items()
        for model, q in models.items()
    ]
    if not rows:
        return []
    notes = {
        f"'{spec}': {corrected['note']}."
        for arm in run.results["arms"].values()
        for summary in arm.values()
        if isinstance(summary, dict)
        for spec, corrected in summary.get("corrected", {}).items()
        if corrected["note"]
    }
    names = [name.replace("_", " ") for name in QUALITIES]
    header = ("judge", "model", "labelled", "refusals", *(f"{name}, %" for name in names))
    text = " ".join([CORRECTED, *(["Not corrected:", *sorted(notes)] if notes else [])])
    return [Text(text), Table(header, rows)]


def _share(rate: list) -> str:
    value, low, high = rate
    return UNDEFINED if value is None else f"{value:.1f} ({low:.1f}-{high:.1f})"


def _signals(config: dict) -> str:
    """Says which judges chose training data, and where the headline is no check on them."""
    headline, cai = config["eval"]["judges"][0], config["cai"]
    used = {"which server pairs the filter learns from": config["filter"]["judge"]}
    if any("cai" in arm for arm in config["arms"]):
        if check := parse_check(cai["check"]).refusal:
            used["which revisions are trained on"] = check
        if cai["schedule"] == "adaptive":
            used["when training stops"] = cai["probe_judge"]
    said = [f"'{spec}' decides {what}" for what, spec in used.items()]
    text = f"Headline by '{headline}'; {', '.join(said)}. "
    if headline in used.values():
        return text + "Signal and headline are one judge: the run trained on what it reports."
    phrases = {name for name, kind in JUDGES.items() if kind.phrases}
    if headline in phrases and phrases & set(used.values()):
        return text + (
            "Both read words alone, so an answer may learn to pass them; a judge of another kind "
            "(classifier, guard, chat) beside them shows whether it did."
        )
    return text


def _table(run: RunData, name: str, beside: str) -> Table:
    columns = {key: run.sets[key].task.columns[0] for key in (name, beside)}
    rows = []
    for arm_id, arm in run.results["arms"].items():
        if all("by_judge" in arm.get(key, {}) for key in columns):
            for judge in arm[name]["by_judge"]:
                cells = [cell for key, c in columns.items() for cell in _cells(arm[key], judge, c)]
                rows.append((arm_id, judge, *cells))
    header = [title for column in columns.values() for title in (column.label, "corrected")]
    return Table(("arm", "judge", *header), rows)


def _cells(summary: dict, judge: str, column: Column) -> tuple[str, str]:
    """Returns a judge's rate in a task and what it is corrected to; "" where there is none."""
    rates = summary["by_judge"].get(judge)
    if rates is None:  # a judge of harm says nothing of harmless requests
        return "", ""
    value, corrected = rates[column.field], summary.get("corrected", {}).get(judge)
    if corrected:
        corrected = _share([corrected["rate"], *corrected["ci95"]])
    return UNDEFINED if value is None else f"{value:.1f}", corrected or ""
