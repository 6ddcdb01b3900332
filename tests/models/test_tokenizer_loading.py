"""Tokenizers of strangers: their code never runs, their files stay in their folder."""

import ast
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

import fedsafe_jax
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.tokenizer_loading import may_not_end, read_tokenizer
from fedsafe_jax.validation import one_line

PACKAGE = pathlib.Path(fedsafe_jax.__file__).parent
MODEL = PACKAGE / "assets" / "model"
FILES = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"


@pytest.fixture
def folder(tmp_path):
    """Files of the packaged tokenizer in a folder of their own."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        shutil.copy(MODEL / name, folder)
    return folder


def change(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def calls_of(source):
    """Names of the methods that load something, with their keywords."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr, ast.unparse(node.func.value), node.keywords


LOADING = ("from_pretrained", "from_config", "load_dataset_builder", "pipeline")


def test_every_call_that_loads_from_a_folder_refuses_its_code():
    """A new call of `from_pretrained` in the package has to say `trust_remote_code=False`."""
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, owner, keywords in calls_of(path.read_text()):
            if name not in LOADING or owner in ("fedsafe_jax", "fs"):
                continue
            told = {k.arg: ast.unparse(k.value) for k in keywords}
            assert told.get("trust_remote_code") == "False", f"{path}: {owner}.{name}"
            seen += 1
    assert seen == 1  # all others pass through `read_tokenizer`


EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').write_text('')\nclass Evil: pass\n"
ASKS = {
    "tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
    },
    "config.json": {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"},
}


@pytest.mark.parametrize("name", ASKS)
def test_a_folder_that_asks_to_run_its_code_is_one_line_whoever_says_yes(folder, name):
    (folder / "evil.py").write_text(EVIL)
    change(folder, name, **ASKS[name])
    program = (
        "import pathlib, sys\n"
        "from fedsafe_jax.inference.pretrained import load_pretrained\n"
        "from fedsafe_jax.models.decoder_config import ModelError\n"
        "try:\n    load_pretrained(sys.argv[1])\n"
        "except ModelError as error:\n    print('REFUSED', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        input="y\ny\ny\n", capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout.count("\n") == 1 and done.stdout.startswith(f"REFUSED {folder}"), done
    assert not list(folder.rglob("ran"))


def test_the_refusal_says_what_was_asked(folder):
    (folder / "evil.py").write_text(EVIL)
    change(folder, "tokenizer_config.json", **ASKS["tokenizer_config.json"])
    with pytest.raises(ModelError, match="asks to run code of the folder"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    "field", ["tokenizer_file", "vocab_file", "fast_tokenizer_files", "special_tokens_map_file"]
)
def test_files_of_other_folders_are_not_read(folder, tmp_path, field):
    other = tmp_path / "tokenizer.0.json"
    shutil.copy(MODEL / "tokenizer.json", other)
    for name in (str(other), "../tokenizer.0.json"):
        value = [name] if field.endswith("s") else name
        change(folder, "tokenizer_config.json", **{field: value})
        with pytest.raises(ModelError, match=f"{field} names .*expected a file of the folder"):
            read_tokenizer(folder)


def test_a_note_of_where_a_file_once_was_is_passed_over(folder):
    change(folder, "tokenizer_config.json", special_tokens_map_file="/nowhere/special.json")
    assert read_tokenizer(folder)("Hello")["input_ids"]


@pytest.mark.parametrize("expression", ["(a+)+$", "(?:x|x)*y", "((a{2,}))+", "(a"])
def test_expressions_that_may_never_end_or_are_none_are_one_line(folder, expression):
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    change(folder, "tokenizer.json", pre_tokenizer=split | {"invert": False})
    with pytest.raises(ModelError) as caught:
        read_tokenizer(folder)
    assert len(one_line(caught.value)) < 600


PUBLIC = (  # GPT-2, Qwen 2, GPT-4o, DeepSeek 3
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@pytest.mark.parametrize("expression", PUBLIC)
def test_expressions_of_public_tokenizers_pass(expression):
    assert not may_not_end(expression)
