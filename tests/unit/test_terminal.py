"""Texts of others reach the terminal and CSV files as texts, whatever they hold."""

from __future__ import annotations

import csv
import io
import logging

import pytest
from rich.table import Table

from dml_dist.cli_data import console as data_console
from dml_dist.runtime.progress import Display, note, phase
from dml_dist.terminal import csv_text, log_to, open_console, printable, say, say_styled

HOSTILE = {
    "photos [v2]": "photos [v2]",
    "set [/old]": "set [/old]",
    "[bold red]a[/]": "[bold red]a[/]",
    "[link=http://x]a": "[link=http://x]a",
    ":smile:": ":smile:",
    "a\x1b[2J": "a\\x1b[2J",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "a\rb": "a\\rb",
    "a\x08b": "a\\x08b",
    "\x9b31m": "\\x9b31m",
    "a\u202egpj.exe": "a\\u202egpj.exe",
    "a\x00b\x7f": "a\\x00b\\x7f",
    "lone \udcff": "lone \\udcff",
    "日本 é 👍": "日本 é 👍",
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items(), ids=repr)
def test_every_way_to_the_terminal_shows_the_text(text: str, shown: str) -> None:
    file = io.StringIO()
    console = open_console(file=file, width=200)
    table = Table(text, title=text)
    table.add_row(text)
    display = Display(console)
    logger = logging.LogRecord("a", logging.WARNING, "", 0, "%s", (text,), None)
    ways = {
        "print": lambda: console.print(text),
        "line": lambda: say(console, text),
        "error": lambda: say_styled(console, "error:", "red", text),
        "note": lambda: display(note(text)),
        "phase": lambda: display(phase(text, 1, 1, text)),
        "log": lambda: logging.lastResort and logging.lastResort.emit(logger),
        "table": lambda: console.print(table),
    }
    before = logging.lastResort
    log_to(console)
    try:
        for way, show in ways.items():
            file.seek(0)
            file.truncate()
            show()
            output = file.getvalue()
            assert output.count(shown) == {"table": 3, "phase": 2}.get(way, 1), (way, output)
            assert output.replace("\n", "").isprintable() or "\x1b" not in output, way
    finally:
        logging.lastResort = before


def test_progress_bars_of_a_terminal_show_the_text() -> None:
    file = io.StringIO()
    console = open_console(file=file, width=200)
    console._force_terminal = True
    with Display(console) as display:
        display(phase("embed [/x]\x1b[2J", 1, 2, "[/y]\x07"))
    assert "embed [/x]\\x1b[2J" in file.getvalue()
    assert "[/y]\\x07" in file.getvalue()


def test_the_commands_use_it() -> None:
    assert type(data_console) is type(open_console())


def test_lines_of_a_message_stay_lines() -> None:
    assert printable("a\n\tb") == "a\n\tb"


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", " =1", "\uff1d1", "==", "-", "+"],
)
def test_csv_cells_are_no_formulas(text: str) -> None:
    (names, row) = csv.reader(io.StringIO(csv_text([text, "b"], [[text, -1.5]])))
    assert names == [f"'{text}", "b"]
    assert row == [f"'{text}", "-1.5"]


@pytest.mark.parametrize(
    "value", ["-1.5", "+3", "-1e-5", "a=b", "a-b", "", "é", 'say "a", b', -3, None]
)
def test_other_csv_cells_stay(value: object) -> None:
    ((read,),) = csv.reader(io.StringIO(csv_text(["a"], [[value]]).partition("\n")[2]))
    assert read == ("" if value is None else str(value))
