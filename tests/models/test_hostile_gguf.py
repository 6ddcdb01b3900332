"""GGUF files of strangers, cut off or claiming anything: one line at once, and little memory."""

import resource
import struct
import time

import gguf
import gguf_files
import numpy as np
import pytest

from fedsafe_jax.models import gguf_folder
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.gguf_reader import GgufFile
from fedsafe_jax.validation import one_line


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a small file."""
    hf = gguf_files.config_of("smollm2", num_hidden_layers=1)
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return gguf_files.write(path, hf, gguf_files.tensors_of(hf)).read_bytes()


@pytest.fixture
def refused(tmp_path):
    """Asserts that a file of some bytes is refused in one short line, soon and without memory."""

    def check(content, *said, name="m.gguf"):
        path = tmp_path / name
        path.write_bytes(content)
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ModelError) as caught:
            gguf_folder.write_folder(path, folder)
        assert time.monotonic() - start < 10
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
        message = one_line(caught.value)
        assert str(path) in message and len(message) < 600 and "\n" not in str(caught.value)
        assert str(folder) not in message
        assert all(word in message for word in said), message

    return check


def header(fields=b"", tensors=b"", num_fields=0, num_tensors=0, version=3):
    return struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_fields) + fields + tensors


def text(value):
    content = value.encode()
    return struct.pack("<Q", len(content)) + content


def info(name, shape, kind=0, offset=0):
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def test_cut_anywhere(whole, refused):
    refused(b"", "no GGUF file")
    refused(whole[:12], "cut off")
    for share in (0.0001, 0.001, 0.01, 0.05, 0.3, 0.7, 0.999):
        refused(whole[: int(len(whole) * share)], "cut off")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04" + bytes(100), "no GGUF file"),
        (b"GGML" + bytes(100), "no GGUF file"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 1, 1), "big-endian"),
        (header(version=1), "version 1"),
        (header(num_fields=2**63), "fields"),
        (header(num_tensors=2**40), "tensors"),
        (header(struct.pack("<Q", 2**62), num_fields=1), "claims"),
        (header(text("a") + struct.pack("<IQ", 8, 2**63), num_fields=1), "claims"),
        (header(text("a") + struct.pack("<IIQ", 9, 0, 2**60), num_fields=1), "cut off"),
        (header(text("a") + struct.pack("<IIQ", 9, 8, 2**60), num_fields=1), "texts"),
        (header(text("a") + struct.pack("<IIQ", 9, 9, 2**60), num_fields=1), "array of type 9"),
        (header(text("a") + struct.pack("<I", 99), num_fields=1), "no type of GGUF"),
        (header((text("a") + struct.pack("<IB", 0, 1)) * 2, num_fields=2), "twice"),
        (header(struct.pack("<Q2s", 2, b"\xff\xfe"), num_fields=1), "UTF-8"),
        (header(tensors=info("t", (2,) * 9), num_tensors=1), "axes"),
        (header(tensors=info("t", (2**40, 2**40)), num_tensors=1), "cut off"),
        (header(tensors=info("t", (0,)), num_tensors=1), "shape"),
        (header(tensors=info("t", (33,), kind=8), num_tensors=1), "multiple of 32"),
        (header(tensors=info("t", (4,), offset=2**63), num_tensors=1), "cut off"),
        (header(tensors=info("t", (4,)) * 2, num_tensors=2) + bytes(99), "twice"),
        (header(tensors=info("t", (4,)) + info("u", (4,)), num_tensors=2) + bytes(99), "share"),
        (header(tensors=info("t", (256,), kind=10), num_tensors=1), "type Q2_K"),
        (header(tensors=info("t", (256,), kind=16), num_tensors=1), "type IQ2_XXS"),
        (header(tensors=info("t", (4,), kind=999), num_tensors=1), "type of number 999"),
        (header(), "architecture ''"),
    ],
)
def test_claims_of_a_header(content, said, refused):
    refused(content, said)


def test_one_part_of_several(whole, refused):
    refused(whole, "split into several files", "llama-gguf-split", name="m-00001-of-00003.gguf")


LIES = [
    ("llama.block_count", 7, "missing"),
    ("llama.block_count", 2**31, "num_hidden_layers"),
    ("llama.embedding_length", 64, "shape"),
    ("llama.embedding_length", 0, "hidden_size"),
    ("llama.attention.head_count", 0, "head_count"),
    ("llama.attention.head_count_kv", 3, "divisor"),
    ("llama.context_length", 0, "max_position"),
    ("llama.feed_forward_length", 2**31, "intermediate_size"),
    ("tokenizer.ggml.eos_token_id", 4096, "no such token"),
]


@pytest.mark.parametrize(("name", "value", "said"), LIES)
def test_numbers_that_lie(whole, refused, name, value, said):
    place = whole.index(text(name)) + len(text(name)) + 4
    refused(whole[:place] + struct.pack("<I", value) + whole[place + 4 :], said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([("add_expert_count", 8)], "mixtures of experts"),
        ([("add_sliding_window", 64)], "attention.sliding_window=64 is not supported"),
        ([("add_rope_scaling_type", gguf.RopeScalingType.YARN)], "'yarn'"),
    ],
)
def test_fields_that_change_what_is_computed(fields, said, tmp_path, refused):
    hf = gguf_files.config_of("smollm2", num_hidden_layers=1)
    path = gguf_files.write(tmp_path / "a", hf, gguf_files.tensors_of(hf), fields=fields)
    refused(path.read_bytes(), said)


def test_other_rotary_factors_and_numbers_that_are_none(tmp_path, refused):
    hf = gguf_files.config_of("smollm2", num_hidden_layers=1)
    tensors = gguf_files.tensors_of(hf)
    path = gguf_files.write(tmp_path / "a", hf, tensors, rope_factors=[1.0, 2.0, 3.0, 9.0])
    refused(path.read_bytes(), "rope_freqs.weight")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = np.nan
    path = gguf_files.write(tmp_path / "b", hf, tensors)
    refused(path.read_bytes(), "blk.0.ffn_down.weight", "not finite")


def test_tokenizers_that_are_none(whole, refused):
    refused(whole.replace(text("smollm"), text("smolln")), "tokenizer.ggml.pre='smolln'")
    model = text("tokenizer.ggml.model") + struct.pack("<I", 8)
    refused(whole.replace(model + text("gpt2"), model + text("bert")), "'bert'")
    refused(whole.replace(text("a b"), text("aab")), "two parts")
    refused(whole.replace(text("a b"), text("~ b")), "do not fit together")
    refused(whole.replace(text("ab"), text("aa")), "do not fit together")
    arch = text("general.architecture") + struct.pack("<I", 8)
    refused(whole.replace(arch + text("llama"), arch + text("mamba")), "architecture 'mamba'")


def test_bytes_changed_anywhere_in_the_header_raise_nothing_else(whole, tmp_path):
    rng = np.random.default_rng(0)
    end = GgufFile(_put(tmp_path, whole)).tensors["token_embd.weight"].start
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, end, 3):
            content[place] = rng.integers(256)
        try:
            file = GgufFile(_put(tmp_path, bytes(content)))
            gguf_folder.gguf_config.config_of(file)
            gguf_folder.gguf_tokenizer.files_of(file)
        except ModelError:
            continue


def _put(folder, content):
    path = folder / "fuzzed.gguf"
    path.write_bytes(content)
    return path
