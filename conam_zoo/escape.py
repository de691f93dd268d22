r"""Text from outside (names of files, folders, classes and models, messages of libraries), made safe for where it goes.

A file name may hold anything but a slash and a zero byte: terminal escape sequences, Rich's markup, TeX, HTML, shell
syntax, and bytes that are not UTF-8, which Python keeps as lone surrogates. There is one function for each target; each
shows what cannot be seen or encoded as an escape such as ``\x1b``.
"""

import html
import re
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

# Control characters, line separators, what reverses the direction of writing, and lone surrogates.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte of a file name
_MARKDOWN = re.compile(r"[\\`*_\[\]|~$#]|(?<=:)//|(?<=www)\.", re.IGNORECASE)


def for_terminal(text: object, *, lines: bool = False) -> str:
    r"""Text for a terminal, a log or a message: one line, unless ``lines`` keeps line breaks and tabs.

    >>> print(for_terminal("red\x1b[31m\nb\udcff.jpg"))
    red\x1b[31m\nb\xff.jpg
    """
    return _HIDDEN.sub(lambda match: match[0] if lines and match[0] in "\n\t" else _visible(match[0]), str(text))


def _visible(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # a byte of a name that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def for_rich(text: object, style: str = "") -> Text:
    """Text for Rich, which then sees no markup, no emoji code and no link in it.

    >>> for_rich("[red]x[0].jpg :tiger:").plain
    '[red]x[0].jpg :tiger:'
    """
    return Text(for_terminal(text, lines=True), style=style)


class PlainConsole(Console):
    """Rich's console, for which every ``str`` is text from outside: style is given by ``rich.text.Text`` alone.

    A notebook gets what a file would get: Rich's own way there is a box for each line, and widgets or a warning.
    """

    def __init__(self, **kwargs: Any) -> None:
        notebook = {"force_jupyter": False, "force_terminal": False} if Console().is_jupyter else {}
        super().__init__(**(notebook | kwargs))

    def render_str(self, text: str, *, style: Any = "", **kwargs: Any) -> Text:
        """The text as it is; ``Console.print``, tables and titles all come by here."""
        rich_text = for_rich(text)
        rich_text.style = style
        rich_text.justify, rich_text.overflow = kwargs.get("justify"), kwargs.get("overflow")
        return rich_text


def for_matplotlib(text: object) -> str:
    r"""Text for a figure, in which dollar signs begin no formula. Shorten it before, not after.

    >>> print(for_matplotlib(r"$\foo$"))
    \$\foo\$
    """
    return for_terminal(text).replace("$", r"\$")


def for_markdown(text: object) -> str:
    r"""Text for a paragraph, a heading or a cell of a table in Markdown; also where HTML in it is passed through.

    >>> print(for_markdown("a|b <b> [x](y)"))
    a\|b &lt;b&gt; \[x\](y)
    """
    return _MARKDOWN.sub(r"\\\g<0>", html.escape(for_terminal(text), quote=False))


def for_html(text: object) -> str:
    """Text for HTML, attributes included.

    >>> for_html('<img src="x">')
    '&lt;img src=&quot;x&quot;&gt;'
    """
    return html.escape(for_terminal(text))


def for_shell(*arguments: str | Path) -> str:
    r"""Arguments for a POSIX shell, as they would be typed; what cannot be printed as bash's and zsh's ``$'\x1b'``.

    >>> print(for_shell("conam", "predict", "a; touch PWNED"))
    conam predict 'a; touch PWNED'
    """
    return " ".join(_shell_word(str(argument)) for argument in arguments)


def _shell_word(text: str) -> str:
    if not _HIDDEN.search(text):
        return shlex.quote(text)
    data = _NO_BYTE.sub("?", text).encode("utf-8", "surrogateescape")
    shown = "".join(chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in data)
    return f"$'{shown}'"
