"""The report of a run that never was: sections, their order, and text that is no markup."""

import json
import re

import pytest
from etils import epath

from fedsafe_jax.config import default_config
from fedsafe_jax.evals import TASKS
from fedsafe_jax.evals.task import select
from fedsafe_jax.report import model_card, page
from fedsafe_jax.report.table import table_rows

NASTY = "<script>alert('&')</script>"


def row(t, **changes):
    """A line of `metrics.jsonl`."""
    return {
        "arm": "fl", "seed": 0, "round": t, "loss": 1.0 / (t + 1), "update_norm": 0.1,
        "tokens_per_second": 10.0, "clients": [0, 1], "delta_norms": [1.0, 2.0],
        "cosines": [0.5, -0.5], "malicious": [1], "bytes_up": 2**20, "bytes_down": 2**20,
        "product_gap": None, "excluded": [], "no_data": [], "skipped": False,
        "seconds": {"federated": 1.0, "cai_train": 2.0}, "eval": {"advbench": 50.0},
    } | changes  # fmt: skip


def refusals(field, value):
    """A refusal task's part of `results.json`."""
    rate = {field: value, "ci95": [value - 5, value + 5]}
    return rate | {"by_judge": {"start": rate, "keyword": rate}}


@pytest.fixture
def run(tmp_path):
    """`(workdir, config, results, outcomes, sets)` of a run with a nasty answer."""
    sets = select(("advbench=chat:mine.jsonl", "over_refusal", "utility"), TASKS)
    arm = {
        "algorithm": "fedavg", "advbench": refusals("safety", 60.0),
        "over_refusal": refusals("rate", 10.0), "utility": {"nll": 1.5, "ci95": [1.4, 1.6]},
    }  # fmt: skip
    compared = {"win_rate": 55.0, "win_rate_ci95": [50.0, 60.0]}
    results = {
        "arms": {
            "base": arm | {"algorithm": ""},
            "fedavg/fl": arm | {"utility": arm["utility"] | compared},
        },
        "data": {
            "filter": {
                "read": 9, "disputed": 1, "dropped_near_evaluation": 2, "dropped_heldout": 3,
                "kept": 3,
            }
        },
        "device": "1 x cpu", "versions": {"jax": "1"},
    }  # fmt: skip
    samples = {"advbench": {"samples": [{"prompt": NASTY, "answer": NASTY}] * 5}}
    outcomes = {"base": [samples], "fedavg/fl": [samples]}
    lines = [row(0), row(1, cai={"steps": 2, "kept": 3, "pairs": 1})]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    return epath.Path(tmp_path), default_config().to_dict(), results, outcomes, sets


def test_sections_in_order_and_no_markup_from_data(run):
    workdir, config, results, outcomes, sets = run
    page.write(workdir, config, results, outcomes=outcomes, sets=sets)
    report = (workdir / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", report) == [
        "By round", "Clients", "Constitutional AI", "Judges",
        "Answers before and after each defence", "Seconds by phase", "Data", "Config",
    ]  # fmt: skip
    # Four prompts, each with two answers.
    assert NASTY not in report and report.count("&lt;script&gt;") == 4 * 3
    assert "Harmful prompts: chat:mine.jsonl; harmless prompts: prompts:" in report
    assert report.count("<img ") == 4  # bars, loss, one probed task, clients
    assert "{{" not in report and (workdir / "figures/advbench_by_round.png").is_file()


def test_figures_that_are_null_leave_gaps(run):
    """Those of a round whose model diverged."""
    workdir, config, results, outcomes, sets = run
    wrong = row(
        2, loss=None, update_norm=None, delta_norms=[None, 1.0], cosines=[None, 0.5],
        eval={"advbench": None, "utility": None},
    )  # fmt: skip
    with (workdir / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(wrong) + "\n")
    results["arms"]["fedavg/fl"]["utility"] = {"nll": None, "ci95": [None, None]}
    page.write(workdir, config, results, outcomes=outcomes, sets=sets)
    report = (workdir / "report.html").read_text()
    assert "n/a" in report and "None" not in report.split("<h2>Config")[0]


def test_who_did_it_by_client_and_how_well_signals_rank_them(run):
    workdir, config, results, outcomes, sets = run
    line = {
        "seed": 0, "client": 3, "rounds": 2, "refused": 90.0, "refusal_lost": 5.0,
        "divergence": 0.25, "relative_divergence": 1.0, "relative_norm": 1.5, "cosine": 0.5,
        "kept": 7.0, "flagged": 2.0, "flagged_share": 2 / 9, "malicious": False,
    }  # fmt: skip
    bad = line | {"client": 8, "refusal_lost": 80.0, "divergence": None, "malicious": True}
    bad |= {"relative_divergence": None, "cosine": None}
    area = {"auroc": 0.75, "ci95": [0.4, 0.95], "per_seed": [0.75], "by_round": [1.0, None]}
    undefined = {"auroc": None, "ci95": [None, None], "per_seed": [None], "by_round": [None]}
    results["attribution"] = {
        "fl": {"clients": [line, bad], "signals": {"refusal_lost": area, "cosine": undefined}},
        "scaffold/fl": {"clients": []},
    }
    page.write(workdir, config, results, outcomes=outcomes, sets=sets)
    text = " ".join(re.sub("<[^>]*>", " ", (workdir / "report.html").read_text()).split())
    worst, other = "fl 8 (malicious) 0 2 90.0 +80.0 n/a n/a 1.50 n/a 2 of 9", "fl 3 0 2 90.0 +5.0"
    assert 0 < text.index(worst) < text.index(f"{other} 0.250 1.00 1.50 0.50 2 of 9")
    assert "fl refusal lost 0.750 (0.400-0.950) 1.00, n/a" in text
    assert "fl cosine to the mean, least first n/a n/a" in text and "scaffold/fl" not in text
    assert (workdir / "figures/attribution.png").is_file()


def test_records_and_cuts_of_dialogues_are_shown(run):
    workdir, config, results, outcomes, sets = run
    turns = [{"role": "user", "content": "I tie a knot."}, {"role": "user", "content": "How long?"}]
    record = {"prompt": "How long?", "initial": "Hm.", "revision": "An hour.", "preferred": True}
    (workdir / "cai").mkdir()
    record |= {"arm": "fl", "seed": 0, "round": 0}
    lines = [record | {"messages": turns}, record]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "cai" / "round_000.jsonl").write_text(text)
    for arm in results["arms"].values():
        arm["utility"] |= {"cut": 3, "n": 40}
    page.write(workdir, config, results, outcomes=outcomes, sets=sets)
    report = (workdir / "report.html").read_text()
    assert report.count("user: I tie a knot.\n\nuser: How long?") == 1
    assert "3 of 40 held-out answers are cut to 256 tokens." in report


def test_the_table_shows_what_an_arm_has(run):
    _, _, results, _, sets = run
    header, rows = table_rows(results, sets)
    assert header[2:] == [
        "harmful refused % \u2191", "harmless refused % \u2193", "benign loss \u2193",
        "win rate % \u2191",
    ]  # fmt: skip
    cells = ["60.0 (55.0-65.0)", "10.0 (5.0-15.0)", "1.500 (1.400-1.600)"]
    assert rows == [["", "base", *cells, ""], ["fedavg", "fl", *cells, "55.0 (50.0-60.0)"]]


def test_the_report_says_what_clients_hold_and_who_holds_nothing(run):
    workdir, config, results, outcomes, sets = run
    results["seeds"] = [7]
    results["data"] |= {
        "pairs_held": [30], "pairs_by_client": [[20, 0, 10]], "harmful_share_held": [0.3],
        "harmful_share_by_client": [[0.25, None, 0.4]],
    }  # fmt: skip
    page.write(workdir, config, results, outcomes=outcomes, sets=sets)
    text = re.sub("<[^>]*>|\\s+", " ", (workdir / "report.html").read_text())
    assert re.search("seed 7 +30 +30.0% +25.0% to 40.0% +1 ", text)
    results["data"] |= {"pairs_lost": [4], "notes": [{"control_tokens": 9, "cut": 5}]}
    page.write(workdir, config, results, outcomes=outcomes, sets=sets)
    text = re.sub("<[^>]*>|\\s+", " ", (workdir / "report.html").read_text())
    assert re.search("clients without data +lost +turns merged +control tokens as text +cut ", text)
    assert re.search("seed 7 +30 +30.0% +25.0% to 40.0% +1 +4 +0 +9 +5 ", text)


def test_the_card_is_markdown_with_the_scores(run):
    _, config, results, _, sets = run
    config = config | {"unsafe_sources": ("chat:package/clients_unsafe.jsonl",)}
    scores = results["arms"]["fedavg/fl"]
    card = model_card.text("fl", config, summary=scores, sets=sets, harmful_share=0.125)
    assert card.startswith("---\nbase_model: package:model\n")
    assert "12.5% of client data harmful)" in card  # as held, not as asked for
    asked = model_card.text("fl", config, summary=scores, sets=sets)
    assert "30.0% of client data harmful as asked for)" in asked
    assert "\n| harmful refused, % | 60.0 (55.0-65.0) |\n" in card
    assert "\n| benign loss | 1.500 (1.400-1.600) |\n" in card
    assert "`chat:package/clients_safe.jsonl`, `chat:package/clients_unsafe.jsonl`." in card


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "Both read words alone"),
        ({"eval.judges": ("start",)}, "Signal and headline are one judge"),
        ({"eval.judges": ("guard:x", "rules")}, "Headline by 'guard:x'; 'start' decides which"),
    ],
)
def test_signal_and_headline_are_told_apart(fields, said):
    from fedsafe_jax.report.judges import _signals

    config = default_config()
    config.update_from_flattened_dict(fields)
    text = _signals(config.to_dict())
    assert said in text
    assert "which revisions are trained on" in text
