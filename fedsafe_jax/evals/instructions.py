"""Instructions that a program can check: those of IFEval (Zhou et al., 2023, arXiv 2311.07911).

`CHECKERS` maps an instruction's id, as google-research's `instruction_following_eval` names it, to
a function of the answer and of the instruction's arguments. What each accepts is what upstream
documents. Three differ, as upstream uses libraries for them: sentences are counted by `sentences`
and not by NLTK's punkt model, words in capitals by a rule for NLTK's tokeniser, and answers in
English capitals or small letters are not checked for being English. The language of an answer is
not checkable here (`NOT_CHECKABLE`); upstream asks `langdetect`.
"""

import json
import re
from collections.abc import Callable, Mapping

NOT_CHECKABLE = ("language:response_language",)
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|Inc|Ltd|Co|No|Fig|approx)"
    r"|\b[A-Z]|\b(?:[A-Za-z]\.)+[A-Za-z])\.$"
)


def sentences(text: str) -> int:
    """Counts sentences: they end at . ! or ? (with quotes and brackets behind), before a blank.

    A full stop behind an abbreviation or an initial ends none.
    """
    count, start = 0, 0
    for end in re.finditer(r"[.!?]+[\"'\u201d\u2019)\]*_]*(?=\s|$)", text):
        if not _ABBREVIATION.search(text[start : end.start() + 1]):
            count += bool(re.search(r"\w", text[start : end.end()]))
            start = end.end()
    return count + bool(re.search(r"\w", text[start:]))


def related(count: int, relation: str, threshold: int) -> bool:
    """Returns whether a count is "less than" a threshold, or "at least" that.

    Raises:
      ValueError: another relation.
    """
    if relation not in ("less than", "at least"):
        raise ValueError(f"the relation {relation!r} is neither 'less than' nor 'at least'")
    return count < threshold if relation == "less than" else count >= threshold


def _keywords(answer: str, keywords: list[str]) -> bool:
    return None not in [re.search(word, answer, re.IGNORECASE) for word in keywords]


def _keyword_frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return related(len(re.findall(keyword.strip(), answer, re.IGNORECASE)), relation, frequency)


def _forbidden_words(answer: str, forbidden_words: list[str]) -> bool:
    return not any([re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in forbidden_words])


def _letter_frequency(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return related(answer.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _number_sentences(answer: str, num_sentences: int, relation: str) -> bool:
    return related(sentences(answer), relation, num_sentences)


def _number_words(answer: str, num_words: int, relation: str) -> bool:
    return related(len(re.findall(r"\w+", answer)), relation, num_words)


def _number_paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Paragraphs between `***`: blank ones count at neither end, and are wrong between others."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    inner = parts[1:-1]
    ends = [parts[0], parts[-1]] if len(parts) > 1 else parts
    return all(inner) and len(inner) + sum(map(bool, ends)) == num_paragraphs


def _nth_paragraph(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs between empty lines; the nth begins with a word, whatever its case."""
    parts = answer.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > count or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", word)[0]
    return count == num_paragraphs and word.lower() == first_word.lower()


def _placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", answer)) >= num_placeholders


def _postscript(answer: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    marker = postscript_marker.strip()
    pattern = known.get(marker, rf"\s*{marker.lower()}.*$")
    return bool(re.search(pattern, answer.lower(), re.MULTILINE))


def _bullets(answer: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", answer, re.MULTILINE)) == num_bullets


def _constrained(answer: str) -> bool:
    return any(option in answer for option in _OPTIONS)


def _highlights(answer: str, num_highlights: int) -> bool:
    """Parts between stars that hold something; parts between two stars count twice, if so."""
    once = re.findall(r"\*([^\n\*]*)\*", answer)
    twice = re.findall(r"\*\*([^\n\*]*)\*\*", answer)
    return sum(bool(part.strip()) for part in once + twice) >= num_highlights


def _sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    pattern = rf"\s?{section_spliter.strip()}\s?\d+\s?"
    return len(re.split(pattern, answer)) - 1 >= num_sections


def _json(answer: str) -> bool:
    text = answer.strip()
    for mark in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(mark)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(answer: str) -> bool:
    titles = re.findall(r"<<[^\n<>]+>>", answer)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


def _two_responses(answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeat_prompt(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(answer: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words in capitals: hyphens join them, as in NLTK's tokeniser, and contractions are parted."""
    words = re.findall(r"\w+(?:[-./&]\w+)*|'\w+", answer)
    return related(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _capitals(answer: str) -> bool:
    return answer.isupper()


def _small_letters(answer: str) -> bool:
    return answer.islower()


def _no_comma(answer: str) -> bool:
    return "," not in answer


def _quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKERS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capitals,
    "change_case:english_lowercase": _small_letters,
    "punctuation:no_comma": _no_comma,
}


def follows(instruction: str, arguments: Mapping, answer: str) -> bool | None:
    """Returns whether an answer follows an instruction; a blank one never does.

    None for an instruction that is not checkable here.

    Args:
      instruction: id, such as "keywords:existence".
      arguments: the instruction's arguments by name.
      answer: the answer.
    """
    if instruction in NOT_CHECKABLE:
        return None
    return bool(answer.strip()) and bool(CHECKERS[instruction](answer, **arguments))


def loosely_follows(instruction: str, arguments: Mapping, answer: str) -> bool | None:
    """Returns whether some form of an answer follows an instruction, upstream's loose accuracy.

    The forms are the answer, that without its first line, without its last, and without both; and
    each of them without stars.

    Args:
      instruction, arguments, answer: as in `follows`.
    """
    lines = answer.split("\n")
    shorter = ("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))
    forms = [answer, *shorter]
    forms += [form.replace("*", "") for form in forms]
    results = [follows(instruction, arguments, form) for form in forms]
    return None if results[0] is None else any(results)
