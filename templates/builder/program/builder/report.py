"""The build's log, and the two ways in which a build does not succeed."""

import unicodedata

# Longest line of the log, characters.
LINE = 2000


class WrongInput(Exception):
    """What the tenant gave cannot be built. Its text is one sentence for the tenant."""


class Failed(Exception):
    """The builder could not do its work; the tenant can only try again."""


def printable(text):
    """The text on one line of bounded length, with no character that a terminal would act on."""
    text = "".join(" " if c in "\t\n\r" else c for c in text[: 2 * LINE] if c in "\t\n\r" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return text if len(text) <= LINE else text[:LINE] + "…"


def quoted(name):
    """A name of the tenant's within a sentence."""
    return repr(name if len(name) <= 200 else name[:200] + "…")


def say(text):
    print(printable(text), flush=True)


def megabytes(size):
    return f"{size / (1 << 20):.0f} MiB"
