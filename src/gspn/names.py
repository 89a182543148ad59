"""What messages say: of unknown names the nearest known one, of errors the reason."""

import difflib
import inspect
from collections.abc import Callable, Iterable

SHOWN = 12  # known names listed at most


def reason_of(error: BaseException) -> str:
    """What the system says of it, or the first line of an error's text, or its type where it has none.

    >>> [reason_of(error) for error in (OSError(2, "No such file", "a"), ValueError("a is 1\\nb is 2"), MemoryError())]
    ['No such file', 'a is 1', 'MemoryError']
    """
    said = getattr(error, "strerror", None) or str(error)
    return next(iter(said.strip().splitlines()), type(error).__name__)


def guess(name: object, known: Iterable[object]) -> str:
    """The end of a message: a question that names the nearest of the `known` names. Empty if none is near.

    >>> guess("gren", ["red", "green"])
    ", did you mean 'green'?"
    """
    by_lower = {str(each).lower(): str(each) for each in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f", did you mean {by_lower[near[0]]!r}?" if near else ""


def unknown(what: str, name: object, known: Iterable[object]) -> str:
    """A message about a name that is not among the `known` ones: it names the nearest, if one is near, and lists them.

    >>> unknown("colour", "gren", ["red", "green"])
    "there is no colour 'gren', did you mean 'green'? There are red, green"
    """
    names = [str(each) for each in known]
    meant = guess(name, names)
    shown = [repr(each) for each in names] if any("," in each or " " in each for each in names) else names
    if len(names) > SHOWN:
        if meant:
            return f"there is no {what} {name!r}{meant}"
        shown = [*shown[:SHOWN], f"{len(names) - SHOWN} more"]
    return f"there is no {what} {name!r}{meant + ' There' if meant else '; there'} are {', '.join(shown)}"


def check_arguments(function: Callable, given: Iterable[str], *others: Callable) -> None:
    """Raises TypeError for a keyword that neither `function` takes nor one of the `others`, to which it passes keywords
    on; the message names the nearest parameter."""
    parameters = [one for each in (function, *others) for one in inspect.signature(each).parameters.values()]
    named = (one.name for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD))
    known = list(dict.fromkeys(named))
    for name in given:
        if name not in known:
            raise TypeError(unknown("argument", name, [each for each in known if each != "self"]))
