"""Judges that are encoders of k classes: windows, classes and folders."""

import json

import numpy as np
import pytest

from fedsafe_jax.data.labelled_answers import LabelledAnswer
from fedsafe_jax.evals import judge_training, judges
from fedsafe_jax.evals.judges import Answered, JudgeError, classifier
from fedsafe_jax.evals.judges.classifier import Head, join, windows

CLASSES = ("compliance", "partial", "refusal")
HEAD = Head(CLASSES, ("partial", "refusal"), max_length=16)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop", "no", "yes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random BERT of three classes as Hugging Face writes it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bert")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    return path


def describe(folder, **values):
    (folder / classifier.NAME).write_text(json.dumps(HEAD._asdict() | values))


def ask(request, answer):
    return Answered((("user", request),), answer)


def expected(folder, *texts):
    """Chances by torch on the same weights."""
    import torch
    import transformers

    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.softmax(model(**tokenizer(*texts, return_tensors="pt")).logits, -1)[0].numpy()


@pytest.mark.parametrize("request_too", [True, False])
def test_chances_are_those_of_transformers(folder, request_too):
    describe(folder, request=request_too)
    texts = ("a b c", "no d e") if request_too else ("no d e",)
    want = expected(folder, *texts)
    if request_too:  # the mean with and without the request
        want = (want + expected(folder, "", "no d e")) / 2
    read = classifier.load(folder)
    got = read.probabilities([ask("a b c", "<think>yes</think>no d e")])[0]
    np.testing.assert_allclose(got, want, atol=1e-5)
    (verdict,) = read.verdicts([ask("a b c", "no d e")])
    assert verdict.label == CLASSES[want.argmax()]
    assert verdict.score == pytest.approx(want[1] + want[2], abs=1e-5)
    assert verdict.refused == (want[1] + want[2] >= 0.5)


def test_windows_cover_the_answer_behind_the_end_of_the_request(folder):
    describe(folder)
    tokenizer = classifier.load(folder).tokenizer
    answer = " ".join("abcdefghijklmnop" * 2)
    harm = HEAD._replace(measures=judges.HARM)
    rows = windows(tokenizer, ask("a b c d e f no yes", answer), harm)
    texts = [tokenizer.decode(row.ids) for row in rows]
    # A quarter of 13 tokens of room is the request's; the answer's ten share two with the last.
    assert texts[0] == "[CLS] f no yes [SEP] a b c d e f g h i j [SEP]"
    assert texts[1].startswith("[CLS] f no yes [SEP] i j k")
    assert texts[-1].endswith("o p [SEP]") and all(row.response_start == 5 for row in rows)
    seen = [i for row in rows for i in row.ids[5:-1]]
    assert len(seen) - 2 * (len(rows) - 1) == 32  # nothing is lost
    short = windows(tokenizer, ask("a", ""), HEAD)
    assert [tokenizer.decode(row.ids) for row in short] == ["[CLS] a [SEP] [SEP]"]
    long = windows(tokenizer, ask("a", "b " * 9999), HEAD)
    assert len(long) == 2 and len(windows(tokenizer, ask("a", "b " * 9999), harm)) == 16


def test_windows_are_joined_by_what_is_measured():
    chances = np.array([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    weights = np.array([16, 4, 1]) / 21
    np.testing.assert_allclose(join(chances, HEAD), weights @ chances)
    harm = HEAD._replace(measures=judges.HARM, refused=("refusal",))
    np.testing.assert_allclose(join(chances, harm), chances[0])  # the least harmless window


def test_a_saved_judge_says_the_same(folder, tmp_path):
    describe(folder)
    one, answers = classifier.load(folder), [ask("a b", "no c"), ask("d", "yes " * 30)]
    classifier.save(one, tmp_path, {"trained_on": ["m"]})
    spec = f"classifier:{tmp_path}"
    (judge,) = judges.make([spec])
    assert judge.measures == judges.REFUSAL and not judge.phrases and judge.trained_on == ("m",)
    assert judge.judge(answers) == one.verdicts(answers)
    assert json.loads((tmp_path / classifier.NAME).read_text())["trained_on"] == ["m"]
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))


def test_a_judge_of_harm_says_so_before_it_is_loaded(tmp_path):
    describe(tmp_path, measures="harm")
    assert judges.measures(f"classifier:{tmp_path}") == judges.HARM


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"refused": ["other"]}, "name some, not all, of the classes compliance, partial"),
        ({"refused": CLASSES}, "name some, not all"),
        ({"classes": ["one"]}, "two or more"),
        ({"measures": "rating"}, "expected 'refusal' or 'harm'"),
        ({"max_length": 4}, "expected 16 or more"),
        ({"request": "yes"}, "expected true or false"),
        ({"classes": 3}, "cannot be read"),
    ],
)
def test_a_judge_json_that_makes_no_sense_is_one_line(tmp_path, values, message):
    describe(tmp_path, **values)
    with pytest.raises(JudgeError, match=message):
        judges.parse(f"classifier:{tmp_path}")


def test_folders_that_are_no_judge(folder, tmp_path):
    with pytest.raises(JudgeError, match=r"no judge\.json there"):
        judges.parse(f"classifier:{tmp_path}")
    describe(folder, classes=["a", "b"], refused=["b"])
    with pytest.raises(JudgeError, match="2 classes, and a head of 3"):
        classifier.load(folder)
    describe(tmp_path, encoder={})
    with pytest.raises(JudgeError, match="cannot be loaded: .*vocab_size"):
        classifier.load(tmp_path)


def row(answer, label, model="m"):
    return LabelledAnswer((("user", "a"),), answer, label, model=model, place="file line 7")


def test_models_are_on_one_side():
    rows = [row("no", "refusal", name) for name in ("a", "b", "a")]
    learned, held = judge_training.split(rows, ["b"])
    assert [len(learned), len(held)] == [2, 1] and held[0].model == "b"
    with pytest.raises(JudgeError, match="no answer of 'c'; the models are a, b"):
        judge_training.split(rows, ["c"])
    with pytest.raises(JudgeError, match="they are all models"):
        judge_training.split(rows, ["a", "b"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("no", "odd")], "file line 7: label 'odd' is none of the classes"),
        ([row("no", "refusal")], "class 'compliance' has no answer"),
    ],
)
def test_labels_and_classes_must_fit(folder, rows, message):
    describe(folder)
    one = classifier.load(folder)
    with pytest.raises(JudgeError, match=message):
        judge_training.train(
            rows, HEAD, one.tokenizer, options=judge_training.TrainingOptions(),
            start=(one.config, one.params), seed=0,
        )  # fmt: skip


def test_half_of_the_requests_are_left_out_and_each_answer_is_drawn_once(folder):
    describe(folder)
    tokenizer = classifier.load(folder).tokenizer
    read = [ask("a b", "no " * n) for n in range(1, 41)]
    whole = [windows(tokenizer, one, HEAD)[0] for one in read]
    alone = [windows(tokenizer, one._replace(messages=()), HEAD)[0] for one in read]
    drawn = list(judge_training._draw(whole, alone, 8, seed=0, epoch=0))
    chosen = np.concatenate([indices for indices, _ in drawn])
    assert sorted(chosen) == list(range(40)) and [len(i) for i, _ in drawn] == [8] * 5
    left_out = sum(one.response_start == 2 for _, rows in drawn for one in rows)
    assert 10 <= left_out <= 30
