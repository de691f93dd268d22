"""Text from outside, for every target: shown as it is, and never read as markup, formula, link, or command."""

import io
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from conam_zoo.escape import (
    PlainConsole,
    for_html,
    for_markdown,
    for_matplotlib,
    for_rich,
    for_shell,
    for_terminal,
)

HOSTILE = (
    "[red]x.jpg",
    "x[0].jpg",
    "[/]out.png",
    "[link=https://a.b]c[/link]",
    ":tiger:.png",
    r"$\foo$",
    r"a\$b$c$\\",
    "a; touch PWNED",
    "$(touch PWNED)`touch PWNED`",
    'it\'s "quoted"',
    "<script>alert(1)</script>&lt;",
    "| a | b |",
    "![x](https://a.b/c.png) **bold** _it_ ~~no~~ #1",
    "-rf",
    "\x1b[31mred\x1b]8;;https://a.b\x07link",
    "two\nlines\ttab\r\x9b31m",
    "reversed\u202egpj.exe",
    "latin\udce9\udcff",
    "猫 кошка 🐈 é e\u0301",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_terminal_sees_one_line_without_controls(name: str) -> None:
    shown = for_terminal(name)
    shown.encode("utf-8")
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u202e\u2028" for char in shown)
    assert shown == name or "\\" in shown


def test_what_is_hidden_is_shown_as_python_writes_it() -> None:
    assert for_terminal("\x1b[31m\n\t\x9b\u202e\udce9.jpg") == "\\x1b[31m\\n\\t\\x9b\\u202e\\xe9.jpg"
    assert for_terminal("a\nb\tc\x1b", lines=True) == "a\nb\tc\\x1b"
    assert for_terminal("猫 é e\u0301 🏳️\u200d🌈") == "猫 é e\u0301 🏳️\u200d🌈"


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True])
def test_the_console_shows_every_text_as_it_is(name: str, terminal: bool) -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=200, force_terminal=terminal)
    table = Table(title=name, show_header=True, box=None)
    table.add_column(name)
    table.add_row(name)
    table.add_row(for_rich(name))
    console.print(f"name: {name}")
    console.print(table)
    with Progress(console=console) as progress:
        progress.console.print(name)
    text = Text.from_ansi(file.getvalue()).plain if terminal else file.getvalue()
    expected = for_terminal(name, lines=True).expandtabs(8).split("\n")[0].rstrip()
    assert text.count(expected) >= 6
    assert "\x1b[31m" not in file.getvalue()
    assert "\x1b]8" not in file.getvalue()


def test_style_is_given_by_text_objects() -> None:
    file = io.StringIO()
    PlainConsole(file=file, force_terminal=True, color_system="standard").print(for_rich("[x]", "red"), "[bold]y")
    assert file.getvalue() == "\x1b[31m[x]\x1b[0m [bold]y\n"


@pytest.mark.parametrize("name", HOSTILE)
def test_matplotlib_draws_no_formula(name: str) -> None:
    from matplotlib import cbook
    from matplotlib.figure import Figure

    shown = for_matplotlib(name)
    assert not cbook.is_math_text(shown)
    assert not cbook.is_math_text(f"{shown} and {shown}")
    assert shown.replace(r"\$", "$") == for_terminal(name)  # what matplotlib then draws
    if name.isascii():
        figure = Figure()
        figure.subplots().set_title(shown)
        figure.suptitle(shown)
        figure.savefig(io.BytesIO(), format="png", dpi=20)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", HOSTILE)
def test_html_holds_text_alone(name: str) -> None:
    page = Page(f'<b title="{for_html(name)}">{for_html(name)}</b>')
    assert page.tags == ["b"]
    assert page.text == page.attributes["title"] == for_terminal(name)


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_holds_text_alone(name: str) -> None:
    """By an implementation of CommonMark and GitHub's tables, the one that Rich brings."""
    from markdown_it import MarkdownIt

    shown = for_markdown(name)
    assert "\n" not in shown
    page = Page(
        MarkdownIt("commonmark", {"html": True})
        .enable(["table", "strikethrough"])
        .render(f"# {shown}\n\n| a | b |\n| --- | --- |\n| {shown} | 1 |\n\nName: {shown}.\n")
    )
    assert set(page.tags) == {"h1", "table", "thead", "tbody", "tr", "th", "td", "p"}
    assert page.tags.count("td") == 2
    assert page.text.count(for_terminal(name)) == 3


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shell_gives_the_argument_back(name: str, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    line = for_shell("printf", "%s\\n", name, "b c")
    assert for_terminal(line) == line  # it can be printed
    done = subprocess.run([bash, "-c", line], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == name.encode("utf-8", "surrogateescape") + b"\nb c\n"
    assert list(tmp_path.iterdir()) == []


def test_a_surrogate_that_stands_for_no_byte_is_quoted_too() -> None:
    assert for_shell("a\ud800b") == "$'a?b'"
    assert for_terminal("a\ud800b") == r"a\ud800b"
