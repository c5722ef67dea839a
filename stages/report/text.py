"""Dataset text made safe to look at: no invisible, reordering or line-breaking characters, and of bounded length."""

from __future__ import annotations

import unicodedata

# Joiners are invisible too, but Persian, Indic scripts and emoji are misspelt without them.
_JOINERS = "\u200c\u200d"
# Control, format (bidi overrides are among these), surrogate, private, unassigned, line and paragraph separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def _escaped(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _UNSEEN:
        return character
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def printable(text: str) -> str:
    """The text with every character that would be unseen, or would reorder its neighbours, written as `\\u202e`."""
    if text.isprintable():
        return text
    return "".join(map(_escaped, text))


def legible(value: object, limit: int) -> str:
    """The value as one printable line of at most `limit` characters; an ellipsis marks the cut."""
    text = printable(" ".join(str(value).split())[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def class_name(name: str, limit: int) -> str:
    """A label's name for a table or an axis; an empty one is still seen."""
    return legible(name, limit) or "(empty)"
