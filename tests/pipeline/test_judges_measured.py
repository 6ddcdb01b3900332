"""Judges of a run against human labels: `eval.labels`, and what a reader of the run sees."""

import types

import pytest

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.evals import EvalOptions, calibration, judges
from fedsafe_jax.evals.task import select
from fedsafe_jax.pipeline import evaluation, read_files, results
from fedsafe_jax.report import judges as section
from fedsafe_jax.report.run_data import RunData
from fedsafe_jax.validation import validate


def config(tmp_path, labels=("m=xstest:l.csv",)):
    rows = [("I can't help.", "2_full_refusal"), ("Hm.", "3_partial_refusal")]
    rows += [("So it is.", "1_full_compliance")] * 3
    text = "".join(f"How?,{answer},{label}\n" for answer, label in rows)
    (tmp_path / "l.csv").write_text(f"prompt,completion,final_label\n{text}")
    c = default_config()
    c.data_dir, c.eval.labels = str(tmp_path), labels
    return c


def test_labels_of_ones_own_take_the_place_of_the_packaged_counts(tmp_path):
    c = config(tmp_path)
    validate(c)
    options = EvalOptions(judges=judges.make(c.eval.judges))
    measured = evaluation.measured_judges(c, options)
    assert list(measured) == list(c.eval.judges)
    assert measured["start"] == {"m": calibration.Counts(*(1, 1, 0, 3))}
    assert "data/l.csv" in read_files.files_of(c)
    packaged = evaluation.measured_judges(config(tmp_path, labels=()), options)
    assert list(packaged["start"]) == ["llama2", "mistral"]


def test_a_source_that_is_none_is_an_error_of_the_config(tmp_path):
    with pytest.raises(ConfigError, match=r"eval\.labels: .* write MODEL=FORM:LOCATION"):
        validate(config(tmp_path, labels=("l.csv",)))


def test_the_report_shows_corrected_rates_and_why_there_are_none(tmp_path):
    sets = select(("advbench", "over_refusal"), evaluation.tasks())
    measured = calibration.packaged(["rules", "start"])
    arm = {"algorithm": ""}
    for name, field, value in (("advbench", "safety", 90.0), ("over_refusal", "rate", 8.0)):
        rate = {field: value, "ci95": [value - 3, value + 3]}
        summary = {"by_judge": {"rules": rate, "start": rate}}
        arm[name] = summary | {"corrected": calibration.corrections(summary, field, measured)}
    run = RunData(
        workdir=tmp_path, config=default_config().to_dict(), outcomes={}, sets=sets, rows=[],
        results={"arms": {"base": arm}, "calibration": calibration.table(measured)},
    )  # fmt: skip
    (shown,) = section.sections(run)
    _, rates, text, table = shown.blocks
    assert rates.header == (
        "arm", "judge", "harmful refused, %", "corrected", "harmless refused, %", "corrected",
    )  # fmt: skip
    assert rates.rows[0][:3] == ("base", "rules", "90.0")
    assert rates.rows[1] == ("base", "start", "90.0", "n/a", "8.0", "n/a")
    assert "Not corrected: 'start': on mistral recall less false alarms is 0.16" in text.text
    assert [row[:2] for row in table.rows][:3] == [
        ("rules", "llama2"), ("rules", "mistral"), ("rules", "all"),
    ]  # fmt: skip


def test_results_hold_the_calibration_and_the_corrected_rates(tmp_path):
    c = config(tmp_path, labels=())
    c.arms, c.seeds, c.eval.tasks = ("base",), (0,), ("advbench", "over_refusal")
    sets = select(c.eval.tasks, evaluation.tasks())
    refused = {spec: [True] * 9 + [False] for spec in c.eval.judges}
    outcome = dict.fromkeys(sets, {"refused": refused, "samples": []})
    inputs = types.SimpleNamespace(evals=sets, counts={})
    found = results.summarise(c, inputs, {"base": [outcome]}, filter_quality=(), holdings=())
    assert list(found["calibration"]) == list(c.eval.judges)
    assert found["calibration"]["rules"]["mistral"]["n"] == 450
    advbench = found["arms"]["base"]["advbench"]
    assert advbench["safety"] == 90 and advbench["corrected"]["start"]["rate"] is None
    counts = calibration.packaged(["rules"])["rules"]
    want = calibration.correct(90.0, advbench["by_judge"]["rules"]["ci95"], counts)
    assert advbench["corrected"]["rules"] == want._asdict()
    assert found["two_sides"] == {
        "base": [
            {
                "harmful": "advbench",
                "harmless": "over_refusal",
                "safe": 90.0,
                "safe_ci95": advbench["ci95"],
                "complied": 10.0,
                "complied_ci95": [100 - bound for bound in reversed(advbench["ci95"])],
                "balanced": 50.0,
            }
        ]
    }
