"""The report's section on judges: rates by each, and which of them chose what was trained on."""

from fedsafe_jax.cai.revise import parse_check
from fedsafe_jax.evals import two_sides
from fedsafe_jax.evals.judges import JUDGES
from fedsafe_jax.evals.task import UNDEFINED, Column
from fedsafe_jax.report.blocks import Section, Table, Text
from fedsafe_jax.report.run_data import RunData


def sections(run: RunData) -> list[Section]:
    """Returns a table of the rates by judge for every pair of tasks that are shown together."""
    tables = [_table(run, name, beside) for name, beside in two_sides.pairs(run.sets)]
    blocks = [table for table in tables if table.rows]
    return [Section("Judges", [Text(_signals(run.config)), *blocks])] if blocks else []


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
    columns = [run.sets[key].task.columns[0] for key in (name, beside)]
    rows = []
    for arm_id, arm in run.results["arms"].items():
        if all("by_judge" in arm.get(key, {}) for key in (name, beside)):
            for judge, rates in arm[name]["by_judge"].items():
                # A judge of harm says nothing of harmless requests.
                both = rates, arm[beside]["by_judge"].get(judge)
                cells = (_cell(r, c) for r, c in zip(both, columns, strict=True))
                rows.append((arm_id, judge, *cells))
    return Table(("arm", "judge", *(column.label for column in columns)), rows)


def _cell(rates: dict | None, column: Column) -> str:
    if rates is None:
        return ""
    value = rates[column.field]
    return UNDEFINED if value is None else f"{value:.1f}"
