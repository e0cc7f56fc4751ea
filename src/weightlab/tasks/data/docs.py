"""The English text that every Python carries: the language reference behind `help()`."""

from __future__ import annotations

import functools


@functools.cache
def docs_text() -> str:
    """Text of `pydoc_data.topics`, each paragraph once.

    Topics quote one another at length (a fifth of the text in Python 3.11); a paragraph is kept where
    it first appears, so that no split of the text can hold another's paragraphs. The text differs
    between Python versions, here about 370,000 characters.

    Example:
        >>> "iterator" in docs_text()
        True
    """
    from pydoc_data.topics import topics

    paragraphs = (part.strip("\n") for topic in topics.values() for part in topic.split("\n\n"))
    return "\n\n".join(dict.fromkeys(part for part in paragraphs if part)) + "\n"
