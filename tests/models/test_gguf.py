"""GGUF files as model folders: families, types, tokenizers, the cache, and the way back."""

import concurrent.futures
import dataclasses
import errno
import json
import os
import pathlib

import gguf
import gguf_files
import numpy as np
import pytest
from safetensors.numpy import load_file

from fedsafe_jax.inference.pretrained import load_pretrained
from fedsafe_jax.models import (
    base_model,
    gguf_folder,
    gguf_reader,
    gguf_tokenizer,
    gguf_writer,
    hub,
)
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.models.decoder_config import ModelError, from_hf
from fedsafe_jax.models.tokenizer_loading import read_tokenizer

FAMILIES = "llama2 llama3.2 smollm2 llama-biased qwen2.5 qwen3 gemma2 gemma3".split()
TEXTS = ["ab ab", "a  1 12 123", "<|start|>user\nab<|end|>", "x\n\ny", "a<think>b", "", "  ab!  "]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(path, folder, dtype=""):
    folder.mkdir()
    gguf_folder.write_folder(path, folder, dtype)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_as_it_was(family, tmp_path):
    changes = {"num_hidden_layers": 2}
    factors = None
    if family == "llama3.2":  # as published; scaling is told by the divisors alone
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        changes["rope_parameters"] = rope
        factors = transformers_divisors(rope, head_dim=16)
    hf = gguf_files.config_of(family, **changes)
    tensors = gguf_files.tensors_of(hf)
    path = gguf_files.write(tmp_path / "m.gguf", hf, tensors, rope_factors=factors)
    ours = read(path, tmp_path / "folder")
    assert ours.keys() == tensors.keys()
    for name, array in tensors.items():
        # Gemma's norms lose a bit of their own by the 1 that a file adds.
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=5e-7 * ("norm" in name))
    expected = dataclasses.replace(from_hf(hf), rms_norm_eps=0.0)
    config = dataclasses.replace(hub.read_config(tmp_path / "folder"), rms_norm_eps=0.0)
    assert config == expected


def transformers_divisors(rope, head_dim):
    """The published rule, frequency by frequency."""
    out = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if wave < high:
            out.append(1.0)
        elif wave > low:
            out.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            out.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return out


def blocks(kind, shape, rng):
    """Random blocks of a type that the package cannot quantise to, with small scales."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16([0.01, 0.02]).tobytes(), np.uint8)
    raw[..., *((slice(0, 4),) if kind == "Q4_K" else (slice(208, 210),))] = (
        scale if kind == "Q4_K" else scale[:2]
    )
    return raw.reshape(*shape[:-1], -1)


def test_every_type_reads_as_transformers_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    hf = gguf_files.config_of(
        "smollm2", num_hidden_layers=1, hidden_size=256, intermediate_size=256, head_dim=64
    )
    tensors, rng = gguf_files.tensors_of(hf), np.random.default_rng(1)
    kinds = {"q_proj": "Q4_1", "k_proj": "Q8_0", "v_proj": "Q4_0", "o_proj": "F16"}
    kinds |= {"gate_proj": "BF16", "up_proj": "Q4_K", "down_proj": "Q6_K"}
    for name, array in tensors.items():
        if "up_proj" in name or "down_proj" in name:
            tensors[name] = blocks(kinds[name.split(".")[-2]], array.shape, rng)
    path = gguf_files.write(tmp_path / "m.gguf", hf, tensors, kinds=kinds)
    ours = read(path, tmp_path / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).state_dict()
    for name, array in ours.items():
        np.testing.assert_allclose(
            array.astype(np.float32), theirs[name].float().numpy(), atol=1e-6, err_msg=name
        )
    kept = {name.split(".")[-2]: array.dtype.name for name, array in ours.items()}
    assert (kept["o_proj"], kept["gate_proj"], kept["up_proj"]) == (
        "float16", "bfloat16", "float32",
    )  # fmt: skip
    assert json.loads((tmp_path / "folder/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "gemma3"])
def test_a_file_gives_the_logits_of_transformers(family, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    hf = gguf_files.config_of(family, num_hidden_layers=1)
    if family == "qwen3":  # transformers reads no size of its heads from a file
        hf = gguf_files.config_of(family, num_hidden_layers=1, head_dim=128)
    tensors = {n: a * 0.15 for n, a in gguf_files.tensors_of(hf).items()}
    gguf_files.write(tmp_path / "m.gguf", hf, tensors)
    if family == "gemma3":  # transformers takes a scale of its own, which files do not tell
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="m.gguf", dtype=torch.float32, query_pre_attn_scalar=16
        )
    else:
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="m.gguf", dtype=torch.float32
        )
    ids = np.random.default_rng(0).integers(0, 40, (2, 9))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    lm = load_pretrained(str(tmp_path / "m.gguf"))
    np.testing.assert_allclose(np.asarray(lm(ids)), expected, atol=1e-4)
    # What others are told to load is a folder.
    assert os.path.isfile(
        os.path.join(base_model.loadable(str(tmp_path / "m.gguf")), "config.json")
    )


@pytest.fixture
def small(tmp_path):
    """A file of a Llama of one layer."""
    hf = gguf_files.config_of("smollm2", num_hidden_layers=1)
    return gguf_files.write(tmp_path / "small.gguf", hf, gguf_files.tensors_of(hf))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_tokenizers_split_as_published_ones(pre, tmp_path):
    from tokenizers import Regex, pre_tokenizers

    hf = gguf_files.config_of("smollm2", num_hidden_layers=1)
    path = gguf_files.write(
        tmp_path / "m.gguf", hf, gguf_files.tensors_of(hf),
        tokenizer=lambda writer: gguf_files.add_tokenizer(writer, pre),
    )  # fmt: skip
    tokenizer = read_tokenizer(model_folder(str(path)))
    pieces = {
        "gpt-2": ["Ġ", "Ġ123"], "smollm": ["ĠĠ", "1", "2", "3"], "llama-bpe": ["Ġ", "Ġ", "123"],
        "qwen2": ["Ġ", "Ġ", "1", "2", "3"], "tekken": ["Ġ", "Ġ", "1", "2", "3"],
    }  # fmt: skip
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab  123")
    assert [piece for piece, _ in split] == ["ab", *pieces[pre]]
    if pre == "llama-bpe":  # the expression of Llama 3's own tokenizer.json
        published = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        theirs = pre_tokenizers.Split(Regex(published), behavior="isolated")
        text = "I'LL go\n\n 1234 (x)…  \r\nend "
        ours = pre_tokenizers.Split(
            Regex(gguf_tokenizer.SPLITTINGS[pre].expression), behavior="isolated"
        )
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)
    begins = tokenizer("ab")["input_ids"][0] == 1
    assert begins == (pre in ("llama-bpe", "tekken"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == "".join(
            c for c in text if c in "\n <>|" or c in gguf_files.LETTERS
        )


def test_the_tokenizer_is_that_of_transformers(small):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    ours = read_tokenizer(model_folder(str(small)))
    theirs = AutoTokenizer.from_pretrained(small.parent, gguf_file=small.name)
    for text in TEXTS:
        if "  1" not in text:  # digits, which transformers does not split off for this name
            assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    turns = [{"role": "user", "content": "ab"}]
    render = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(turns, **render) == theirs.apply_chat_template(turns, **render)
    assert ours.special_tokens_map == theirs.special_tokens_map


@pytest.mark.parametrize("family", ["smollm2", "gemma2"])
def test_vocabularies_by_score_are_those_of_transformers(family, tmp_path):
    from transformers import GemmaTokenizer, LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    space = "\u2581"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(60, 80))]
    tokens += [space, *"abcdehlo", "ab", "he", "ll", f"{space}he", "llo", f"{space}hello", "hel"]
    tokens += ["  "] if family == "gemma2" else []
    types = [2, 3, 3] + [6] * 20 + [1] * (len(tokens) - 23)
    left = range(len(tokens), gguf_files.VOCAB)
    tokens, types = tokens + [f"[PAD{i}]" for i in left], types + [5] * len(left)
    scores = [float(-i) for i in range(len(tokens))]

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    hf = gguf_files.config_of(family, num_hidden_layers=1)
    path = gguf_files.write(tmp_path / "m.gguf", hf, gguf_files.tensors_of(hf), tokenizer=add)
    ours = read_tokenizer(model_folder(str(path)))
    spelled = [space * 2 if token == "  " else token for token in tokens]
    vocab = {token: i for i, token in enumerate(spelled)}
    merges = generate_merges(vocab, dict(zip(spelled, scores, strict=True)))
    kind = GemmaTokenizer if family == "gemma2" else LlamaTokenizer
    theirs = kind(vocab=vocab, merges=merges, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    for text in ("hello hello", "hello  ab", "@ab?", " hello", "<s>hello</s>"):
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours(text, add_special_tokens=False)["input_ids"] == expected
        assert ours(text)["input_ids"] == [1, *expected]
        assert ours.decode(expected) == theirs.decode(expected)


def test_a_turn_may_end_by_several_tokens(tmp_path):
    hf = gguf_files.config_of("smollm2", num_hidden_layers=1)
    path = gguf_files.write(
        tmp_path / "m.gguf", hf, gguf_files.tensors_of(hf), fields=[("add_eot_token_id", 1)]
    )
    for name in ("config.json", "generation_config.json"):
        assert json.loads((model_folder(str(path)) / name).read_text())["eos_token_id"] == [2, 1]


def test_one_folder_is_made_of_one_content(small, own_cache, tmp_path):
    first = model_folder(str(small))
    assert first.parent == own_cache / "fedsafe_jax" / "models"
    assert first.parent.stat().st_mode & 0o777 == 0o700
    other = small.rename(tmp_path / "renamed.gguf")
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert model_folder(str(other)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made


def test_what_a_kill_leaves_is_not_read_and_goes(small, own_cache):
    first = model_folder(str(small))
    left = first.rename(first.with_name(f".{first.name}.abcd_123.tmp"))
    (left / "model.safetensors").unlink()  # killed before the weights
    hub.load_params(model_folder(str(small)), hub.read_config(first), "float32")
    assert not left.exists()


def test_many_at_once_make_one_folder(small, monkeypatch):
    made = []
    rename = gguf_folder._rename
    monkeypatch.setattr(gguf_folder, "_rename", lambda *a: (made.append(a), rename(*a)))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(model_folder, [str(small)] * 3))
    assert len(set(folders)) == len(made) == 1
    names = {path.name for path in folders[0].parent.iterdir()}
    assert names == {"lock", folders[0].name}


def test_a_disk_without_locks_has_one_folder_too(small, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(gguf_folder.fcntl, "flock", refuse)
    write = gguf_folder.write_folder

    def meanwhile(path, folder, dtype=""):
        write(path, folder, dtype)
        if len(list(pathlib.Path(folder).parent.glob(".*.tmp"))) == 1:  # another process
            model_folder(str(small))

    monkeypatch.setattr(gguf_folder, "write_folder", meanwhile)
    folder = model_folder(str(small))
    assert {path.name for path in folder.parent.iterdir()} == {"lock", folder.name}


def test_a_cache_that_others_may_write_to_is_not_used(small, own_cache):
    folder = own_cache / "fedsafe_jax"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(gguf_folder.whole_files.WorkdirError, match="anybody may write.*XDG_CACHE"):
        model_folder(str(small))


def test_a_missing_package_is_one_line(small, monkeypatch):
    monkeypatch.setattr(gguf_reader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'fedsafe_jax\[gguf\]'"):
        model_folder(str(small))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_packaged_model_goes_out_and_comes_back(dtype, tmp_path):
    packaged, path = base_model.PACKAGED_FOLDER, tmp_path / "m.gguf"
    gguf_writer.write_file(packaged, path, dtype)
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds == {"F32", "F16"} if dtype == "float16" else {"F32"}
    ours, theirs = read(path, tmp_path / "folder"), load_file(packaged / "model.safetensors")
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array.astype(ours[name].dtype))
    one, other = read_tokenizer(tmp_path / "folder"), read_tokenizer(packaged)
    assert one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template
    assert one.special_tokens_map == other.special_tokens_map
    for text in (*TEXTS, "Héllo, 東京  12 <|end|>"):
        assert one(text)["input_ids"] == other(text)["input_ids"]


def test_what_is_not_written_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(ModelError, match="model_type 'gemma2' is not written as GGUF"):
        gguf_writer.write_file(tmp_path, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_splitting_that_keeps_what_others_take_out_is_not_theirs(tmp_path):
    splitting = gguf_writer.SPLITTINGS["llama-bpe"]
    state = {
        "model": {"type": "BPE", "ignore_merges": splitting.whole_words},
        "normalizer": {"type": "NFC"} if splitting.composed else None,
        "pre_tokenizer": json.loads(gguf_writer._state_of(splitting)),
    }
    name = gguf_writer._splitting(state, tmp_path)
    assert gguf_writer.SPLITTINGS[name] == splitting
    text = json.dumps(state)
    assert '"invert": false' in text
    with pytest.raises(ModelError, match="splits texts as one of"):
        gguf_writer._splitting(
            json.loads(text.replace('"invert": false', '"invert": true')), tmp_path
        )
