"""The messages that the troubleshooting page quotes are those that slr has."""

import ast
import re
from pathlib import Path

import pytest

import slr

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "book" / "troubleshooting.md"
HOLE = "…"  # on the page: what differs from case to case


def plain(text):
    return " ".join(text.split())


def messages():
    """Every string of the package but docstrings, what is put into it as a hole."""
    found = set()
    for file in Path(slr.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else HOLE for p in node.values]
                found.add(plain("".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(plain(node.value))
    return found


def quoted(page):
    """The messages of a page: inline code that is, or ends, the term of a definition."""
    return re.findall(r"^`([^`]+)`\n: ", page, re.M)


def known(message, texts):
    """Whether some text has the literal parts of a message, one after the other."""
    parts = [plain(part) for part in message.split(HOLE)]
    assert max(map(len, parts)) > 11 or message == "out of memory", message
    wanted = re.compile(".*".join(map(re.escape, parts)))
    return any(wanted.search(text) for text in texts)


@pytest.fixture(scope="module")
def texts():
    return messages()


def test_every_message_of_the_page_is_one_of_slr(texts):
    found = quoted(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 60
    assert len(set(found)) == len(found)
    lost = [message for message in found if not known(message, texts)]
    assert not lost


def test_a_message_that_slr_does_not_have_is_found(texts):
    assert known("model type … is not supported; slr knows …", texts)
    assert not known("model kind … is not supported; slr knows …", texts)
    assert not known("slr knows …; model type … is not supported", texts)  # in another order
    assert not known("a word of a docstring: Raise if `value` holds NaN", texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "100000"], "fewer than the … samples asked for"),
        (["--skip", "*.nothing"], "in the recipe fits no layer"),
        (["--prune", "magnitude", "--calibration", "embedded"], "reads no data"),
        (["--rank", "4000"], "is above …, the most for"),
    ],
)
def test_messages_are_said_where_the_page_says_so(options, message, tmp_path, capsys):
    from slr.cli import app

    with pytest.raises(SystemExit) as end:
        app(["compress", "tiny", "--out", str(tmp_path / "out"), *options])
    assert end.value.code == 2
    said = plain(capsys.readouterr().err)
    assert re.search(message.replace(HOLE, ".*"), said), said
    assert message in plain(PAGE.read_text(encoding="utf-8"))
