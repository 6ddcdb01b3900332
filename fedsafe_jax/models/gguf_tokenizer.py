"""The tokenizer that a GGUF file describes, as the files of a Hugging Face folder.

A file holds tokens, their types, and merges or scores; how a text is split before the merges is a
name (`tokenizer.ggml.pre`), whose meaning is in llama.cpp's code (src/llama-vocab.cpp). Here each
name stands for the pre-tokenizer of the models that have it.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedsafe_jax.models import hub_files
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.gguf_reader import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of tokens, as llama.cpp numbers them
MOST_TOKENS = 2**21
MOST_LETTERS = 1_000  # of a token of a vocabulary by scores, whose parts are all looked up
SPACE = "\u2581"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Splitting(NamedTuple):
    """How a byte-level tokenizer splits a text.

    Attributes:
      expression: what a piece is; "" for GPT-2's, which the byte-level pre-tokenizer has.
      single_digits: whether digits are split off one by one before.
      whole_words: whether a piece that is a token is not merged from its parts.
      composed: whether characters are composed first (NFC).
      begins: whether a text begins with `bos` unless the file says so.
    """

    expression: str = ""
    single_digits: bool = False
    whole_words: bool = False
    composed: bool = False
    begins: bool = False


_LLAMA3 = Splitting(_WORDS + r"\p{N}{1,3}|" + _ENDS, whole_words=True, begins=True)
_QWEN2 = Splitting(_WORDS + r"\p{N}|" + _ENDS, composed=True)
_DIGITS = Splitting(single_digits=True)
# By `tokenizer.ggml.pre`; the first name of an equal one is what is written.
SPLITTINGS = {
    "gpt-2": Splitting(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _LLAMA3._replace(whole_words=False),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "tekken": Splitting(_TEKKEN, whole_words=True, begins=True),
}


class _Vocabulary(NamedTuple):
    """Tokens of a file, their types (all 1 where it has none), and its special ids by name."""

    tokens: list[str]
    types: list[int]
    ids: dict[str, int]


def files_of(file: GgufFile) -> dict[str, str]:
    """Returns the texts of a tokenizer's files by name.

    Args:
      file: an opened GGUF file.

    Raises:
      ModelError: a tokenizer that is not supported, or whose fields do not fit together.
    """
    vocabulary = _vocabulary(file)
    kind = file.text("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, begins = _byte_level(file, vocabulary)
    elif kind == "llama":
        tokenizer, begins = _by_scores(file, vocabulary)
    else:
        raise ModelError(
            f"{file.path}: tokenizer.ggml.model='{kind[:60]}' is not supported; expected gpt2 or "
            "llama."
        )
    _add_whole_tokens(tokenizer, vocabulary)
    _put_ends(file, tokenizer, vocabulary, begins)
    config: dict[str, Any] = {
        # The one class of transformers 5 that keeps to tokenizer.json, whatever the family.
        "tokenizer_class": hub_files.NEW_CLASS,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for name, short in names.items():
        if name in vocabulary.ids:
            config[f"{short}_token"] = vocabulary.tokens[vocabulary.ids[name]]
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    if template := file.text("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    return files


def _vocabulary(file: GgufFile) -> _Vocabulary:
    tokens = _texts(file, "tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= MOST_TOKENS:
        raise ModelError(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens):,} tokens; expected at most "
            f"{MOST_TOKENS:,}."
        )
    if len(set(tokens)) < len(tokens):
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens has the same token twice.")
    types = _numbers(file, "tokenizer.ggml.token_type", len(tokens)) or [1] * len(tokens)
    ids = {}
    for name in ("bos", "eos", "unknown", "padding"):
        field = f"tokenizer.ggml.{name}_token_id"
        if field in file.fields:
            ids[name] = file.number(field)
            if not isinstance(ids[name], int) or not 0 <= ids[name] < len(tokens):
                raise ModelError(f"{file.path}: {field}={ids[name]}: there is no such token.")
    return _Vocabulary(tokens, [int(kind) for kind in types], ids)


def _byte_level(file: GgufFile, vocabulary: _Vocabulary) -> tuple["Tokenizer", bool]:
    """Returns a byte-level tokenizer, and whether its texts begin with `bos`."""
    from tokenizers import Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    name = file.text("tokenizer.ggml.pre", "none given")
    if name not in SPLITTINGS:
        raise ModelError(
            f"{file.path}: tokenizer.ggml.pre='{name[:60]}' is not supported; expected "
            f"{', '.join(SPLITTINGS)}."
        )
    splitting = SPLITTINGS[name]
    merges = [tuple(merge.split(" ")) for merge in _texts(file, "tokenizer.ggml.merges")]
    if any(len(merge) != 2 for merge in merges):
        raise ModelError(f"{file.path}: tokenizer.ggml.merges: expected two parts, 'a b', in each.")
    model = _bpe(
        file,
        BPE,
        vocab={token: i for i, token in enumerate(vocabulary.tokens)},
        merges=merges,
        ignore_merges=splitting.whole_words,
    )
    tokenizer = Tokenizer(model)
    if splitting.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(splitting)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, splitting.begins


def pre_tokenizer(splitting: Splitting) -> Any:
    """Returns the pre-tokenizer of `tokenizers` that splits a text so."""
    from tokenizers import Regex, pre_tokenizers

    if splitting.expression:
        first = [pre_tokenizers.Split(Regex(splitting.expression), behavior="isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] * splitting.single_digits
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splitting.expression)
    return pre_tokenizers.Sequence([*first, last]) if first else last


def _by_scores(file: GgufFile, vocabulary: _Vocabulary) -> tuple["Tokenizer", bool]:
    """Returns a tokenizer of SentencePiece's kind: characters, merged by score, else bytes.

    The order of merges is that of scores (as `convert_slow_tokenizer` of transformers has it); of
    Gemma's, whose scores say nothing, that of tokens.
    """
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    gemma = file.text("general.architecture").startswith("gemma")
    tokens = vocabulary.tokens
    if gemma:  # a run of blanks is written as blanks, though texts have another sign for them
        tokens = [SPACE * len(t) if " " in t and not t.strip(" ") else t for t in tokens]
        scores: Sequence[float] = range(0, -len(tokens), -1)
    else:
        scores = _numbers(file, "tokenizer.ggml.scores", len(tokens))
        if not scores:
            raise ModelError(f"{file.path}: field 'tokenizer.ggml.scores' is missing.")
    unknown = vocabulary.ids.get("unknown")
    if unknown is None:
        unknown = next((i for i, kind in enumerate(vocabulary.types) if kind == UNKNOWN), None)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens has the same token twice.")
    if "tokenizer.ggml.merges" in file.fields:
        merges = [tuple(m.split(" ")) for m in _texts(file, "tokenizer.ggml.merges")]
    else:
        merges = _merges(file, vocab, scores)
    model = _bpe(
        file,
        BPE,
        vocab=vocab,
        merges=merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefixed = not gemma and bool(file.fields.get("tokenizer.ggml.add_space_prefix", True))
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first" if prefixed else "never", split=False
        )
    if prefixed:
        decoding.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer, True


def _merges(
    file: GgufFile, vocab: dict[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Returns the merges that a vocabulary implies: all pairs of tokens that are a token, by score.

    Equal scores go by the sizes of the parts, then by their ids.
    """
    pairs = []
    for (token, _), score in zip(vocab.items(), scores, strict=True):
        if len(token) > MOST_LETTERS:
            raise ModelError(
                f"{file.path}: tokenizer.ggml.tokens: a token has {len(token):,} characters; at "
                f"most {MOST_LETTERS:,} are read."
            )
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        parts = [(a, b) for a, b in cuts if a in vocab and b in vocab]
        parts.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        pairs += [(score, len(a), len(b), a, b) for a, b in parts]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(a, b) for *_, a, b in pairs]


def _bpe(file: GgufFile, kind: Any, **arguments: Any) -> Any:
    """Makes a model of `tokenizers`, whose errors are of no type of their own."""
    try:
        return kind(**arguments)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust's panics are no Exception
        words = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{file.path}: tokens and merges of the tokenizer do not fit together ({words})."
        ) from error


def _add_whole_tokens(tokenizer: "Tokenizer", vocabulary: _Vocabulary) -> None:
    """Has the tokenizer find tokens whole that are no text: control tokens, and those of users."""
    from tokenizers import AddedToken

    special = set(vocabulary.ids.values())
    for start, kind in enumerate(vocabulary.types):
        token = vocabulary.tokens[start]
        if kind == CONTROL or start in special:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _put_ends(
    file: GgufFile, tokenizer: "Tokenizer", vocabulary: _Vocabulary, begins: bool
) -> None:
    """Has texts begin with `bos` and end with `eos`, where the file or its kind says so."""
    from tokenizers.processors import TemplateProcessing

    ids = vocabulary.ids
    first = bool(file.fields.get("tokenizer.ggml.add_bos_token", begins)) and "bos" in ids
    last = bool(file.fields.get("tokenizer.ggml.add_eos_token", False)) and "eos" in ids
    if not (first or last):
        return
    around = {name: vocabulary.tokens[ids[name]] for name in ("bos", "eos") if name in ids}
    before, after = [around["bos"]] * first, [around["eos"]] * last
    one = [*before, "$A", *after]
    tokenizer.post_processor = TemplateProcessing(
        single=one,
        pair=[*one, *(f"{token}:1" for token in (*before, "$B", *after))],
        special_tokens=[(around[name], ids[name]) for name in around],
    )


def _texts(file: GgufFile, name: str) -> list[str]:
    value = file.fields.get(name)
    if not isinstance(value, list):
        raise ModelError(f"{file.path}: field '{name}' is missing, or no list of texts.")
    return value


def _numbers(file: GgufFile, name: str, count: int) -> list:
    """Returns the numbers of a field, [] without one."""
    value = file.fields.get(name)
    if value is None:
        return []
    if not isinstance(value, np.ndarray) or len(value) != count:
        raise ModelError(f"{file.path}: field '{name}': expected {count:,} numbers, one a token.")
    return value.tolist()
