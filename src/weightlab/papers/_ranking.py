"""Ranked text search over a handful of documents with weighted fields, in plain Python."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

Document = Mapping[str, str]

_BRITISH = re.compile(r"(?<=\w{3})is(?=(ation|e[dr]?|ing)$)")
_SUBWORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SPELLED_OUT = str.maketrans({"λ": "lambda", "Λ": "lambda", "ł": "l", "ø": "o", "ß": "ss"})


def terms(text: str) -> list[str]:
    """Split into lower-case words, with accents, plural "s" and British "-ise" folded away.

    Example:
        >>> terms("λ-Orthogonality, Padé rationals, quantisation")
        ['lambda', 'orthogonality', 'pade', 'rational', 'quantization']
    """
    return [_stem(word.lower()) for word in _words(text)]


def rank(query: str, documents: Sequence[Document], weights: Mapping[str, float]) -> list[tuple[int, float]]:
    """Order the documents that match a query, best first.

    Each query word scores `idf * sum over fields of weight * tf-saturation`; a document's sum is
    scaled by the share of the query it covers, in idf. A word also matches the beginning of longer
    words, at less weight; a word that matches nothing so matches what is spelled like it.

    Args:
        query: Free text.
        documents: Field -> text. Words in CamelCase are also found by their parts.
        weights: Field -> weight; fields that are absent from it do not count.

    Returns:
        Pairs of a document's index and its score > 0. Equal scores keep the documents' order.

    Example:
        >>> documents = [{"title": "rotations", "body": "muon"}, {"title": "the Muon optimizer"}]
        >>> [index for index, _ in rank("muon", documents, {"title": 2.0, "body": 1.0})]
        [1, 0]
    """
    counts = [
        {field: Counter(_index_terms(document.get(field, ""))) for field in weights} for document in documents
    ]
    vocabulary = {term for fields in counts for counter in fields.values() for term in counter}
    scores = [0.0] * len(documents)
    covered = [0.0] * len(documents)
    total = 0.0
    for word in dict.fromkeys(terms(query)):
        matches = _expand(word, vocabulary)
        hits = [
            sum(weight * _saturate(_frequency(fields[field], matches)) for field, weight in weights.items())
            for fields in counts
        ]
        frequency = sum(hit > 0 for hit in hits)
        idf = math.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
        total += idf
        for index, hit in enumerate(hits):
            scores[index] += idf * hit
            covered[index] += idf * (hit > 0)
    ranked = [(i, scores[i] * covered[i] / total) for i in range(len(documents)) if scores[i] > 0]
    return sorted(ranked, key=lambda pair: -pair[1])


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKD", text.translate(_SPELLED_OUT))
    return re.findall(r"[A-Za-z0-9]+", "".join(c for c in folded if not unicodedata.combining(c)))


def _stem(word: str) -> str:
    singular = word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] not in "isu" else word
    return _BRITISH.sub("iz", singular)


def _index_terms(text: str) -> list[str]:
    result = []
    for word in _words(text):
        result.append(_stem(word.lower()))
        parts = _SUBWORD.findall(word)
        if len(parts) > 1:
            result.extend(_stem(part.lower()) for part in parts if len(part) > 2)
    return result


def _expand(word: str, vocabulary: set[str]) -> dict[str, float]:
    matches = {word: 1.0} if word in vocabulary else {}
    if len(word) >= 3:
        for term in vocabulary:
            if term.startswith(word) and term != word:
                matches[term] = 0.3 + 0.5 * len(word) / len(term)
    if not matches and len(word) >= 4:
        for term in difflib.get_close_matches(word, sorted(vocabulary), n=3, cutoff=0.75):
            matches[term] = 0.6 * difflib.SequenceMatcher(None, word, term).ratio()
    return matches


def _frequency(counter: Counter[str], matches: Mapping[str, float]) -> float:
    return sum(counter[term] * weight for term, weight in matches.items())


def _saturate(frequency: float) -> float:
    return 2 * frequency / (1 + frequency)
