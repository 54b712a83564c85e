"""The course: editions, slides, assignments and their grader, projects, quiz.

No chapter is run here: `make test` runs them; at night also what students get, up to the first
exercise.  `make grade` tries all answers; here all but those of the last assignment, which
evaluates models.
"""

import importlib
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from course import chapters, editions, grade, otter, outline, projects, sheets, slides  # noqa: E402
from course.plain import plain  # noqa: E402

SHEETS = sheets.sheets()
NIGHTLY = os.environ.get("SLR_CHAPTERS") == "all"


@pytest.fixture(params=chapters.CHAPTERS, ids=lambda path: path.stem)
def chapter(request):
    return chapters.chapter(request.param)


@pytest.fixture(params=SHEETS, ids=lambda sheet: sheet.folder.name)
def sheet(request):
    return request.param


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in chapters.tags(cell)]


def test_student_gets_everything_but_solutions(chapter):
    handed = editions.student(chapter)
    nbformat.validate(handed)
    mine = "\n".join(cell.source for cell in handed.cells)
    assert "@title Solution" not in mine
    for cell in tagged(chapter, "solution"):
        assert cell.source not in mine
        lines = [line for line in cell.source.splitlines() if line.startswith("    ")]
        assert not lines or "\n".join(lines) not in mine
    for cell in handed.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    there = f"{editions.QUIZ}, on the book's page *Quiz*"  # not in a student's notebooks
    assert there in mine
    theirs = [
        c.source.replace(editions.QUIZ, there)
        for c in chapter.cells
        if not {"solution", "exercise"} & {*chapters.tags(c)}
    ]
    kept = [c.source for c in handed.cells]
    assert all(source in kept for source in theirs)


def test_student_marks_oneself(chapter):
    """Every asserting check is kept, and fails until something is filled in."""
    handed = editions.student(chapter)
    to_fill, calls = tagged(handed, "exercise"), tagged(handed, "mark")
    assert len(to_fill) == len(calls) == len(list(chapters.exercises(chapter)))
    for cell, call, was in zip(to_fill, calls, tagged(chapter, "exercise"), strict=True):
        assert "your code" in cell.source
        assert "..." not in cell.source
        checks = re.search(r"\ndef check_.*", was.source, re.S)[0].rpartition("\n# check_")[0]
        assert checks.strip() in cell.source
        space = {"torch": torch, "slr": importlib.import_module("slr"), "math": __import__("math")}
        exec(cell.source, space)
        with pytest.raises(NotImplementedError, match="your code"):
            exec(call.source, space)


@pytest.mark.skipif(not NIGHTLY, reason="as long as the chapters; SLR_CHAPTERS=all")
def test_students_chapter_runs_up_to_the_first_exercise(chapter):
    handed = editions.student(chapter)
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    with pytest.raises(CellExecutionError) as stop:
        NotebookClient(handed, timeout=None, resources=where).execute()
    assert stop.value.ename == "NotImplementedError"
    stopped = [c for c in handed.cells if "error" in {o.output_type for o in c.get("outputs", [])}]
    assert stopped == tagged(handed, "mark")[:1]


def test_instructor_has_a_plan_and_marks_for_slides(chapter):
    made = editions.instructor(chapter)
    nbformat.validate(made)
    assert len(made.cells) == len(chapter.cells) + 1
    (plan,) = tagged(made, "instructor")
    for exercise in chapters.exercises(chapter):
        assert f"| {exercise.number} | {exercise.kind} | {exercise.level} |" in plan.source
    kinds = [cell.metadata["slideshow"]["slide_type"] for cell in made.cells]
    assert 5 < kinds.count("slide") < len(kinds)


def test_deck_shows_figures_takeaways_and_summary(chapter):
    made = outline.slides(chapter)
    assert 12 <= len(made) <= 40  # a short chapter has fewer
    shown = "\n".join(text for slide in made for _, text in slide.body)
    for words in chapters.takeaways(chapter):
        assert words in shown
    code = [cell for cell in chapter.cells if cell.cell_type == "code"]
    figures = [text for cell in code for _, text in outline.figure(cell)]
    assert len(figures) >= 4
    assert all(text in shown for text in figures)
    assert made[0].kind == "title"
    assert [slide.title for slide in made][-2:] == ["Summary", "Exercises"]
    said = shown + "\n".join(note for slide in made for note in slide.notes)
    assert "## Further reading" not in said
    assert shown.count("**Proposition") == sum(
        c.source.count("**Proposition") for c in chapter.cells
    )
    assert "*Proof" not in shown
    stated = [b for s in made for k, b in s.body if k == "md" and outline.STATED.match(b)]
    assert len(stated) == sum(len(outline.STATED.findall(c.source)) for c in chapter.cells)
    assert "<!--" not in said


def test_hand_outs_need_no_book(chapter):
    """Nothing of the book's own notation is left, and statements keep their numbers."""
    text = "\n\n".join(c.source for c in chapter.cells if c.cell_type == "markdown")
    for mark in (":::", "{prf:", "{cite", ":label:", "$$ (eq-", "](#", "glossary.md"):
        assert mark not in text, mark
    number = chapters.title(chapter).split(".")[0]
    found = re.findall(r"^\*\*Proposition (\d+)\.(\d+) \(", text, re.M)
    assert found == [(number, str(i)) for i in range(1, len(found) + 1)]
    assert text.count("*Proof.* ") == len(found) >= 1


def test_sources_are_cited_by_author_and_year():
    assert plain("Wanda {cite}`wanda2024,candes2009` of {cite:t}`roofline2009`") == (
        "Wanda (Sun et al., 2024; Candès and Recht, 2009) of Williams et al. (2009)"
    )
    assert plain("$$a = b$$ (eq-5-1)") == "$$a = b \\tag{5.1}\n$$"


def test_decks_ask_nothing_of_the_network(chapter):
    page = slides.deck(chapter)
    assert not re.search(r"(src|poster)=[\"']?(https?:)?//", page)
    assert not re.search(r"<link|@import|url\(", re.sub(r"base64,[\w+/=]+", "", page))
    assert re.findall(r"<script[^>]*src=\"(.*?)\"", page) == [slides.MATHJAX]
    assert "$" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)  # all formulas are found
    assert slides.mathjax().is_file()


def test_handed_out_assignment_has_neither_answers_nor_hidden_tests(sheet):
    assert sheet.points == 20
    handed = sheets.handed_out(sheet)
    nbformat.validate(handed)
    mine = "\n".join(cell.source for cell in handed.cells)
    assert "SOLUTION" not in mine
    names = {cell.name.rstrip("*") for cell in sheet.cells if cell.name}
    assert names == {cell.name for cell in sheet.tests if not cell.hidden}
    assert {name + "*" for name in names} == {cell.name for cell in sheet.tests if cell.hidden}
    for cell in sheet.cells:
        if cell.kind == "test":
            assert (cell.source in mine) != cell.hidden
        if cell.kind == "question":
            answer = re.search(r"# BEGIN SOLUTION\n(.*?)\s*# END", cell.source, re.S)[1]
            assert answer not in mine
    nbformat.validate(otter.master(sheet))


def test_nothing_filled_in_earns_nothing(sheet, tmp_path):
    file = chapters.write(sheets.handed_out(sheet), tmp_path / "mine.ipynb")
    found = list(grade.marks(sheet, grade.code_of(file)))
    assert {mark.got for mark in found} == {0}
    assert all("your code" in mark.said for mark in found)


@pytest.mark.parametrize("sheet", SHEETS[:4], ids=lambda sheet: sheet.folder.name)
def test_answers_get_the_marks_that_they_should(sheet, capsys):
    assert grade.rehearse(sheet) == []
    assert capsys.readouterr().out.splitlines()[0].endswith("20 of 20")
    assert len(list(sheet.wrong())) == 3


def test_an_answer_with_other_marks_than_it_should_have_is_reported(capsys):
    lenient = sheets.Sheet(SHEETS[0].folder, tuple(c for c in SHEETS[0].cells if c.name != "1a*"))
    faults = grade.rehearse(lenient)
    assert [fault.split(": ")[1].split(".")[0] for fault in faults] == [
        "wrong_1 keeps 1a*",
        "wrong_2 keeps 1a*",
    ]


def test_a_submission_has_a_process_and_its_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chapters, "BUILD", tmp_path)
    sheet = SHEETS[0]
    good = tmp_path / "good.py"
    good.write_text("print('noise')\n" + "\n\n".join(sheet.answer()))
    grade.submissions(sheet, [good])
    assert "20 of 20" in capsys.readouterr().out
    assert (tmp_path / "grades" / sheet.folder.name / "good.json").is_file()
    (tmp_path / "gone.py").write_text("import os\nos._exit(3)\n")
    assert {mark.said for mark in grade.apart(sheet, tmp_path / "gone.py")} == {"ended with code 3"}
    (tmp_path / "loop.py").write_text("while True: pass\n")
    late = grade.apart(sheet, tmp_path / "loop.py", seconds=1)
    assert {mark.said for mark in late} == {"took longer than 1 seconds"}
    assert sum(mark.points for mark in late) == 20


@pytest.mark.parametrize("name", projects.NAMES)
def test_project_has_a_baseline_that_runs_and_a_rubric(name):
    folder = ROOT / "course" / "projects"
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    rubric = text.split("## Rubric")[1]
    assert sum(map(int, re.findall(r"\| (\d+) \|$", rubric, re.M))) == 20
    assert f"python -m course.projects.{name}" in text
    torch.manual_seed(0)
    rows = importlib.import_module(f"course.projects.{name}").baseline(small=True)
    assert len(rows) >= 2
    for row in rows:
        assert list(row) == list(rows[0])
        assert all(value > 0 for key, value in row.items() if key == "perplexity")


def test_quiz_has_five_questions_a_chapter_with_folded_answers():
    text = (ROOT / "book" / "quiz.md").read_text(encoding="utf-8")
    sections = re.split(r"^\(quiz-(\d+)\)=\n", text, flags=re.M)[1:]
    assert len(sections) == 2 * len(chapters.CHAPTERS)
    for number, section, file in zip(sections[::2], sections[1::2], chapters.CHAPTERS, strict=True):
        notebook = chapters.read(file)
        assert section.startswith(f"## {chapters.title(notebook)}\n")
        asked = re.findall(
            r"^\*\*(\d+\.\d)\*\* .+\n\n:::{dropdown} Answer\n.+\n:::$", section, re.M
        )
        assert asked == [f"{number}.{i}" for i in range(1, 6)]
        linked = [c for c in notebook.cells if f"](../book/quiz.md#quiz-{number})" in c.source]
        assert len(linked) == 1, file.name


def test_course_page_tells_what_there_is():
    page = (ROOT / "book" / "course.md").read_text(encoding="utf-8")
    assert chapters.overview() in page
    for name in projects.NAMES:
        assert f"`python -m course.projects.{name}`" in page
    titles = [re.search(r"# # Assignment (\d\. .*)", s.cells[0].source or "") for s in SHEETS]
    assert all(title is None or f"| {title[1]} |" in page for title in titles)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("student", "instructor", "slides", "grade"):
        assert f"make {target}" in page
        assert re.search(rf"^{target}:", makefile, re.M)


def test_modules_are_small():
    for file in (ROOT / "course").rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 350, file
