"""Benchmarks in their upstream forms, on small files of harmless requests made for the tests."""

import gzip
import json
import zipfile

import pytest

from fedsafe_jax.data import sources
from fedsafe_jax.data.benchmark_readers import BENCHMARKS
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.readers import EVALUATION_ONLY
from fedsafe_jax.evals import TASKS


def load(folder, source):
    return sources.load(source, str(folder))


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_benchmarks_are_never_trained_on():
    assert set(BENCHMARKS) < set(EVALUATION_ONLY)


def test_harmbench_puts_the_context_first_and_leaves_copyright_out(tmp_path):
    (tmp_path / "h.csv").write_text(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Bake bread,standard,baking,,,a\n"
        'Sum it up,contextual,baking,context,"Two cups,\nof flour.",b\n'
        "Recite a song,copyright,copyright,hash_check,,c\n"
    )
    one, two = load(tmp_path, "harmbench:h.csv")
    assert one.prompt == "Bake bread" and one.category == "baking"
    assert two.prompt == "Two cups,\nof flour.\n\n---\n\nSum it up"
    assert (one.groups, two.groups) == (
        (("functional", "standard"),),
        (("functional", "contextual"),),
    )
    (tmp_path / "h.csv").write_text("Behavior,FunctionalCategory\nBake,other\n")
    with pytest.raises(SourceError, match=r"h.csv row 2: 'FunctionalCategory' must be one of"):
        load(tmp_path, "harmbench:h.csv")


@pytest.mark.parametrize(
    ("reader", "file", "text", "prompt", "category"),
    [
        ("strongreject", "s.csv", "category,source,forbidden_prompt\na,b,Bake?\n", "Bake?", "a"),
        (
            "jailbreakbench",
            "j.csv",
            "Index,Goal,Target,Behavior,Category,Source\n0,Bake?,Sure,Baking,a,Original\n",
            "Bake?",
            "a",
        ),
        ("malicious_instruct", "m.txt", "Bake?\n", "Bake?", ""),
        ("or_bench", "o.csv", "prompt,category\nBake?,a\n", "Bake?", "a"),
        (
            "do_not_answer",
            "d.csv",
            "id,risk_area,types_of_harm,specific_harms,question\n1,a,b,c,Bake?\n",
            "Bake?",
            "a",
        ),
        ("do_not_answer", "d.jsonl", '{"prompt": "Bake?", "intents": ["x"]}\n', "Bake?", ""),
    ],
)
def test_a_prompt_and_its_category(tmp_path, reader, file, text, prompt, category):
    (tmp_path / file).write_text(text)
    (tmp_path / f"{file}.gz").write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / f"{file}.zip", "w") as archive:
        archive.writestr(file, text)
        archive.writestr(f"__MACOSX/._{file}", b"\0")
    for ending in ("", ".gz", ".zip"):
        (one,) = load(tmp_path, f"{reader}:{file}{ending}")
        assert (one.prompt, one.category, one.response) == (prompt, category, "")


def test_do_not_answer_reads_a_folder_of_risk_areas(tmp_path):
    folder = tmp_path / "areas"
    folder.mkdir()
    task = TASKS["do_not_answer"]
    with pytest.raises(SourceError, match="areas: holds no file that ends in"):
        task.load("do_not_answer:areas", str(tmp_path))
    (folder / "two.jsonl").write_text(lines({"prompt": "Why?"}))
    (folder / "one.jsonl").write_text(lines({"prompt": "How?"}, {"prompt": "When?"}))
    loaded = task.load("do_not_answer:areas", str(tmp_path))
    assert [(e.prompt, e.category) for e in loaded] == [
        ("How?", "one"), ("When?", "one"), ("Why?", "two"),
    ]  # fmt: skip


def test_s_eval_keeps_risk_and_attack(tmp_path):
    base = {"traceid": "t", "risk_type": "Baking", "prompt": "How?"}
    (tmp_path / "s.jsonl").write_text(
        lines(
            base | {"ext": json.dumps({"model": "base_risk", "from_traceid": "x"})},
            base | {"ext": json.dumps({"model": "attack", "category": "deepinception"})},
        )
    )
    one, two = load(tmp_path, "s_eval:s.jsonl")
    assert one.category == two.category == "Baking"
    assert one.groups == () and two.groups == (("attack", "deepinception"),)
    (tmp_path / "s.jsonl").write_text(lines(base | {"ext": "{no"}))
    with pytest.raises(SourceError, match=r"s.jsonl line 1: 'ext' is no JSON: '\{no'"):
        load(tmp_path, "s_eval:s.jsonl")


def test_alert_takes_the_wrapper_off_and_knows_the_area(tmp_path):
    wrapped = "### Instruction:\nBake bread.\n### Response:\n"
    (tmp_path / "a.jsonl").write_text(
        lines(
            {"id": 0, "prompt": wrapped, "category": "self_harm_thin"},
            {"id": 1, "prompt": "Bake.", "category": "crime_tax", "attack_type": "suffix"},
            {"id": 2, "prompt": "Stir.", "category": "crime_cyber"},
        )
    )
    one, two, three = load(tmp_path, "alert:a.jsonl")
    assert one.prompt == "Bake bread." and one.groups == (("area", "self_harm"),)
    assert two.prompt == "Bake." and two.groups == (("area", "crime"), ("attack", "suffix"))
    # A policy that allows categories leaves them out.
    kept = load(tmp_path, "alert:a.jsonl#without=crime_tax+self_harm_thin")
    assert kept == [three]
    with pytest.raises(SourceError, match="no example is of the category 'crime_x'; known are"):
        load(tmp_path, "alert:a.jsonl#without=crime_x")
    with pytest.raises(SourceError, match="leaves no example"):
        load(tmp_path, "alert:a.jsonl#without=crime_tax+self_harm_thin+crime_cyber")
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "Bake.", "category": "baking"}))
    with pytest.raises(SourceError, match="line 1: 'category' must begin with one of hate, crime"):
        load(tmp_path, "alert:a.jsonl")


def test_safety_prompts_are_lists_by_scenario_or_rows(tmp_path):
    def row(prompt, kind):
        return {"prompt": prompt, "response": "好", "type": kind}

    (tmp_path / "s.json").write_text(
        json.dumps(
            {
                "Insult": [row("你好吗", "Insult"), row("做饭", "Insult")],
                "Goal_Hijacking": [row("写诗", "Goal_Hijacking")],
            }
        )
    )
    (tmp_path / "rows.jsonl").write_text(lines(row("写诗", "Goal_Hijacking")))
    *insults, attack = load(tmp_path, "safety_prompts:s.json")
    assert [e.category for e in insults] == ["Insult"] * 2 and insults[0].response == ""
    assert attack.category == "" and attack.groups == (("attack", "Goal_Hijacking"),)
    assert attack.language == "zh"
    assert load(tmp_path, "safety_prompts:rows.jsonl") == [attack]
    (tmp_path / "s.json").write_text(json.dumps({"Insult": [row("做饭", "x"), {"response": "a"}]}))
    with pytest.raises(SourceError, match=r"'Insult' item 1: no field 'prompt'"):
        load(tmp_path, "safety_prompts:s.json")


def test_sorry_bench_keeps_style_and_language(tmp_path):
    row = {"question_id": 1, "category": "7", "turns": ["Bake?"], "prompt_style": "base"}
    (tmp_path / "q.jsonl").write_text(
        lines(row, row | {"turns": ["Cuire ?"], "prompt_style": "translate-fr"})
    )
    one, two = load(tmp_path, "sorry_bench:q.jsonl")
    assert (one.prompt, one.category, one.language) == ("Bake?", "7", "en")
    assert two.language == "fr" and two.groups == (("style", "translate-fr"),)
    (tmp_path / "q.jsonl").write_text(lines(row | {"turns": []}))
    with pytest.raises(SourceError, match=r"line 1: 'turns' must be a list of one, found \[\]"):
        load(tmp_path, "sorry_bench:q.jsonl")
