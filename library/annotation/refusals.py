"""What a model says in place of a caption, and the caption in what it says."""

import re

_LABEL = re.compile(r"^(?:caption|description|answer)\s*:\s*", re.IGNORECASE)
_QUOTED = re.compile(r'^(["“])([^"“”]*)(["”])$')
_REFUSAL = re.compile(
    r"^(?:(?:i'?m|i am|we'?re|we are)\s+(?:very\s+|so\s+)?(?:sorry|unable|not able|not comfortable)\b"
    r"|sorry\b|apologies\b|i apologi[sz]e\b|unfortunately,? i\b"
    r"|i (?:can ?not|can'?t|won'?t|will not|could ?n[o']t|must decline|do not feel|don'?t feel)\b"
    r"|as an ai\b|as a (?:large )?language model\b"
    r"|this (?:image|request|content) (?:violates|goes against)\b)",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Return whether a text begins as models decline to describe an image."""
    return _REFUSAL.match(text.replace("’", "'")) is not None


def caption_in(text: str) -> str:
    """Return the caption in what a model said, on one line: lines of a caption file are variants of it.

    A label before it ("Caption:") and quotes around the whole are left out.
    """
    line = _LABEL.sub("", " ".join(text.split()))
    quoted = _QUOTED.match(line)
    return quoted[2].strip() if quoted else line
