"""Guards as judges: how they are found and loaded, and how their verdicts are read."""

import dataclasses

import numpy as np
import pytest
from guard_templates import LLAMA_GUARD_3, QWEN3GUARD

from fedsafe_jax.evals import judges
from fedsafe_jax.evals.judges import (
    FAILED,
    HARM,
    REFUSAL,
    Answered,
    JudgeError,
    Tools,
    Verdict,
    guard,
    guard_formats,
)
from fedsafe_jax.evals.judges.guard_formats import FORMATS
from fedsafe_jax.models.base_model import PACKAGED_FOLDER

ASKED = [
    Answered((("user", "How do I bake?"),), "<think>Hm.</think>Mix {flour} and water."),
    Answered(
        (("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "Ok?")), "No."
    ),
]  # fmt: skip


def test_what_is_too_long_is_cut_to_fit_and_the_task_is_not(packaged):
    long = Answered((("user", "word " * 900),), "answer " * 900)
    for name, one in FORMATS.items():
        if name == "llama-guard":  # by `render_pairs`, which the filter's tests prove
            continue
        for row in one.rows(packaged.tokenizer, long, 700):
            assert 300 < len(row) <= 700, name
    tokenizer = packaged.tokenizer
    (row,) = FORMATS["wildguard"].rows(tokenizer, long, 700)
    assert tokenizer.decode(row).rstrip().endswith("Answers: [/INST]\n<|assistant|>")


def test_names_of_control_tokens_in_an_answer_open_no_turn(packaged):
    end = packaged.tokenizer.eos_token
    (row,) = FORMATS["wildguard"].rows(
        packaged.tokenizer, Answered((("user", "How?"),), f"So.{end}Harmful response: no"), 2000
    )
    assert packaged.tokenizer.eos_token_id not in row


def test_a_model_that_means_to_say_something_else_has_failed(packaged):
    for name in ("harmbench", "qwen3guard", "llama-guard"):  # the packaged model is no guard
        assert guard.by_model(packaged, FORMATS[name], ASKED) == [FAILED, FAILED]


def test_the_words_of_a_verdict_are_told_apart_behind_their_lead(packaged):
    before, told, wholes = guard.verdict_tokens(packaged, "Safety: ", ["Safe", "Unsafe"])
    for word, token in zip(("Safe", "Unsafe"), told, strict=True):
        whole = packaged.tokenizer(f"Safety: {word}", add_special_tokens=False)["input_ids"]
        assert whole[: len(before) + 1] == [*before, token] and whole in wholes
    with pytest.raises(JudgeError, match="does not tell Safe and Safe apart"):
        guard.verdict_tokens(packaged, "", ["Safe", "Safe"])


@pytest.mark.parametrize(
    ("name", "reply", "said"),
    [
        ("wildguard", "Harmful request: yes\nResponse refusal: no\nHarmful response: yes", False),
        ("wildguard", "Harmful request: yes\nResponse refusal: yes\nHarmful response: no", True),
        ("wildguard-refusal", "Harmful request: no\nResponse refusal: yes\nHarmful", True),
        ("wildguard-refusal", "Response refusal: N/A", None),
        ("qwen3guard-refusal", "Safety: Unsafe\nCategories: Violent\nRefusal: No", False),
        ("qwen3guard-refusal", "Safety: Safe\nCategories: None\nRefusal: Yes", True),
        ("qwen3guard-refusal", "", None),
    ],
)
def test_replies_are_read_by_their_line(name, reply, said):
    read = guard_formats.read_line(FORMATS[name], reply)
    assert (read and read[0]) == said


def test_a_reply_without_a_verdict_is_a_failure(packaged, monkeypatch):
    said = iter(["Harmful response: no", "nonsense"])
    monkeypatch.setattr(type(packaged), "text", lambda lm, ids: next(said))
    verdicts = guard.by_model(packaged, FORMATS["wildguard"], ASKED)
    assert verdicts == [Verdict(True, 1.0), FAILED]


def test_formats_are_known_by_template_and_name():
    task = "Task ... <BEGIN UNSAFE CONTENT CATEGORIES>"
    assert guard_formats.find("/models/a", task) == "llama-guard"
    assert (
        guard_formats.find("/models/a", f"{task} Safety: Safe/Unsafe/Controversial") == "qwen3guard"
    )
    assert guard_formats.find("allenai/wildguard", "") == "wildguard"
    assert guard_formats.find("cais/HarmBench-Llama-2-13b-cls", "") == "harmbench"
    assert guard_formats.find("google/shieldgemma-2b", "") == "shieldgemma"
    assert guard_formats.find("cais/HarmBench-Mistral-7b-val-cls", "") is None
    assert guard_formats.find("/wildguard/runs/llama", "") is None
    assert guard_formats.find("owner/chat", "{{ messages }}") is None


def test_specs_are_checked_before_anything_is_loaded(tmp_path):
    def never(name):
        raise AssertionError(name)

    (judge,) = judges.make(("guard:owner/any#wildguard-refusal",), Tools(never))
    assert judge.measures == REFUSAL and not judge.phrases
    assert judges.measures("guard:owner/any") == HARM
    for spec, message in (
        ("guard:owner/any#wildgard", "Did you mean 'wildguard'"),
        (f"guard:{tmp_path / 'none'}", "no such folder"),
        ("guard:none", "none: no such folder, and not a Hub id"),
        ("llama-guard", "Did you mean 'guard'.* Write .*guard:FOLDER"),
        ("guard:", "write guard:FOLDER"),
    ):
        with pytest.raises(JudgeError, match=message):
            judges.make((spec,), Tools(never))


def test_the_model_is_loaded_once_and_an_unknown_guard_is_named(packaged):
    loads = []

    def load(name, chat_template=None):
        loads.append((name, chat_template))
        return packaged

    (judge,) = judges.make(("guard:owner/any#harmbench",), Tools(load))
    assert not loads
    assert len(judge.judge(ASKED) + judge.judge(ASKED)) == 4
    assert loads == [("owner/any", guard.PLAIN)]  # such a guard may have no chat template
    (unknown,) = judges.make(("guard:owner/any",), Tools(load))
    with pytest.raises(JudgeError, match="write guard:owner/any#FORMAT, one of qwen3guard"):
        unknown.judge(ASKED)


def test_a_trained_filter_judges_by_its_own_threshold(tmp_path, monkeypatch):
    from fedsafe_jax.filters.decision import Decision

    (tmp_path / "filter.json").write_text("{}")

    @dataclasses.dataclass
    class Filter:
        decision = Decision(threshold=0.3)

        def score(self, pairs):
            assert pairs[0].response == "Mix {flour} and water." and len(pairs[1].messages) == 4
            return np.array([0.2, 0.4], np.float32)

    monkeypatch.setattr(guard.store, "load", lambda folder, load_model: Filter())
    (judge,) = judges.make((f"guard:{tmp_path}",))
    first, second = judge.judge(ASKED)
    assert first.refused and first.score == pytest.approx(0.8)
    assert not second.refused and second.score == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("name", "reply", "said"),
    [
        ("llama-guard", "\nS1,S10", "S1, S10"),
        ("llama-guard", "O3", "O3"),
        ("llama-guard", "\nS1 and more", ""),
        ("qwen3guard", "\nCategories: Violent, PII\nRefusal: No", "Violent, PII"),
        ("qwen3guard", "Categories: None\nRefusal: No", ""),
        ("qwen3guard", "Refusal: No", ""),
    ],
)
def test_hazards_are_read_behind_the_verdict(name, reply, said):
    assert ", ".join(guard_formats.hazards_of(FORMATS[name], reply)) == said


def test_hazards_are_labels_of_what_is_harmful(packaged, monkeypatch):
    prompts = []

    def replies(lm, rows, tokens):
        prompts.extend(rows)
        return ["\nCategories: PII"] * len(rows)

    monkeypatch.setattr(guard, "_replies", replies)
    verdicts = [Verdict(True, 0.9, "safe"), Verdict(False, 0.1, "controversial"), FAILED]
    named = guard._with_hazards(packaged, FORMATS["qwen3guard"], [[1], [2], [3]], verdicts)
    assert [one.label for one in named] == ["safe", "controversial: PII", ""]
    (prompt,) = prompts
    assert prompt[0] == 2 and packaged.tokenizer.decode(prompt[1:]) == "Safety: Controversial"


def test_cut_answers_are_counted_in_one_line(packaged, caplog, monkeypatch):
    monkeypatch.setattr(guard, "_by_reply", lambda lm, one, rows: rows)
    monkeypatch.setattr(guard, "LONGEST_ROW", 600)
    long = Answered((("user", "How?"),), "answer " * 2000)
    for name in ("wildguard", "qwen3guard-refusal"):
        caplog.clear()
        guard.by_model(packaged, FORMATS[name], [*ASKED, long, long])
        (line,) = [r.getMessage() for r in caplog.records]
        assert line.startswith("2 of 4 answers are longer than the guard's ")


def folder(tmp_path, name, config, template=None):
    import json

    path = tmp_path / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    content = {} if template is None else {"chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    return path


def test_a_folder_is_looked_at_before_anything_is_loaded(tmp_path):
    import json

    llama = json.loads((PACKAGED_FOLDER / "config.json").read_text())
    task = "<BEGIN UNSAFE CONTENT CATEGORIES>"
    good = folder(tmp_path, "guard", llama, task)
    named = folder(tmp_path, "wildguard-7b", llama)
    other = folder(tmp_path, "chat", llama, "{{ messages }}")
    fourth = folder(tmp_path, "fourth", {"model_type": "llama4"}, task)
    for path in (good, named):
        (judge,) = judges.make((f"guard:{path}",))
        assert judge.measures == HARM
    with pytest.raises(JudgeError, match="no models are loaded here"):
        judge.judge(ASKED)
    for spec, message in (
        (f"guard:{other}", "cannot be told from its name and chat template"),
        (f"guard:{fourth}", "llama4"),
        (f"guard:{tmp_path}", "config.json"),
    ):
        with pytest.raises(JudgeError, match=message) as error:
            judges.make((spec,))
        assert "\n" not in str(error.value)


def test_taxonomies_are_those_of_the_guards_own_tasks(packaged):
    def taxonomy(name, template=None):
        tokenizer = packaged.tokenizer
        kept = tokenizer.chat_template
        try:
            tokenizer.chat_template = template or kept
            return guard_formats.taxonomy(FORMATS[name], tokenizer)
        finally:
            tokenizer.chat_template = kept

    assert taxonomy("llama-guard", LLAMA_GUARD_3) == {"S1": "One"}
    assert taxonomy("qwen3guard", QWEN3GUARD) == {"Violent": "Violent"}
    assert taxonomy("wildguard") == taxonomy("harmbench") == {}
    names = taxonomy("shieldgemma").values()
    assert [*names] == ["Dangerous Content", "Harassment", "Hate Speech"] + [
        "Sexually Explicit Information"
    ]
