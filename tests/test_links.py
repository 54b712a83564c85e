"""The checker of links finds what is dead, and forgives what only may be."""

import http.server
import threading

import pytest

from book import links


def faults(tmp_path, **texts):
    for name, text in texts.items():
        file = tmp_path / f"{name.replace('_', '/')}.html"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return links.internal(links.built(tmp_path), lambda path: (tmp_path / path).exists())


def test_links_that_lead_somewhere(tmp_path):
    (tmp_path / "p.svg").write_text("<svg/>")
    one = (
        '<h1 id="x">.</h1><a href="a/two.html#y&amp;">.</a><a href="#x">.</a><img src="p.svg?v=1">'
    )
    two = '<a id="y&amp;" href="../one.html?q#x">.</a><a href="mailto:me">.</a><a href="https://e.org">.'
    assert faults(tmp_path, one=one, a_two=two) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('<a href="other.html">', "other.html is not there"),
        ('<a href="#x">', "#x has no such anchor"),
        ('<a href="two.html#gone">', "two.html#gone has no such anchor"),
        ('<img src="_images/gone.svg">', "_images/gone.svg is not there"),
        ('<p id="x"><p id="x">', "id 'x' 2 times"),
    ],
)
def test_faults_are_found(tmp_path, text, fault):
    assert faults(tmp_path, one=text, two="<h1 id='here'>") == [f"one.html: {fault}"]


def test_templates_of_the_theme_are_no_pages(tmp_path):
    assert faults(tmp_path, one="", _static_x="<a href='{{ x }}'>") == []


def test_links_to_other_servers(tmp_path):
    page = links.Page(
        '<a href="https://e.org/a#x"><a href="https://e.org/a"><a href="b.html">'
        '<a href="https://mybinder.org/v2/gh/OW/RE/main"><a href="https://github.com/OW/RE">'
    )
    assert links.elsewhere([page], "https://github.com/OW/RE") == ["https://e.org/a"]
    assert len(links.elsewhere([page], "https://github.com/some-one/their")) == 3


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            codes = {"/ok": 200, "/gone": 404, "/closed": 403, "/get": 405}
            self.send_response(codes[self.path])
            self.end_headers()

        def do_GET(self):
            self.path = "/ok" if self.path == "/get" else self.path
            self.do_HEAD()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://localhost:{found.server_address[1]}"
        found.shutdown()


def test_only_a_clear_no_is_a_fault(server, capsys):
    asked = [f"{server}/{name}" for name in ("ok", "gone", "closed", "get")]
    assert links.external(asked) == [f"{server}/gone: 404"]
    said = capsys.readouterr().out
    assert f"no clear answer: {server}/closed: 403" in said
    assert "/get" not in said


def test_without_a_network_nothing_is_dead(server, monkeypatch, capsys):
    monkeypatch.setattr(links, "answer", lambda link: ("dead", "Name or service not known"))
    assert links.external(["https://e.org/a"]) == []
    assert "no network" in capsys.readouterr().out
