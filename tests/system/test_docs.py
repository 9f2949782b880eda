"""The pages of docs/ that hold code: executed in order, they print and draw what stands in them."""

import contextlib
import json
import pathlib
import sys

import matplotlib
import pytest
from tiers import everyday

from docs import execute

DOCS = pathlib.Path(__file__).parents[2] / "docs"
SHORT = ("equinox.md", "nnx.md", "shipping.md", "zoo.md")


@pytest.fixture(autouse=True)
def _backend():
    before = matplotlib.get_backend()
    yield
    matplotlib.use(before)


def run(page, directory):
    cells = execute.read(page)
    with contextlib.chdir(directory):
        for cell in execute.execute(cells):
            assert cell.agrees, f"{cell.place}: expected\n{cell.expected}\ngot\n{cell.output}\n{execute.__doc__}"
    return cells


@pytest.mark.nightly
@pytest.mark.x64_off
def test_add_a_layer(tmp_path):
    cells = run(DOCS / "add_a_layer.md", tmp_path)
    assert sum(bool(cell.expected) for cell in cells) >= 7 and (tmp_path / "schur" / "certificate.json").exists()


@pytest.mark.x64_off
def test_your_network(tmp_path):
    cells = run(DOCS / "your_network.md", tmp_path)
    assert sum(bool(cell.expected) for cell in cells) >= 5 and (tmp_path / "sklearn" / "certificate.json").exists()


@pytest.mark.nightly
def test_theory(tmp_path):
    cells = run(DOCS / "theory.ipynb", tmp_path)
    assert sum(cell.figures for cell in cells) == 4 and sum(bool(cell.expected) for cell in cells) >= 7


@pytest.mark.x64_off
@pytest.mark.parametrize(
    "page", everyday(["break_a_certificate.md", "first_certificate.md", "ship_it.md"], "first_certificate.md")
)
def test_a_page_that_does_not_train(page, tmp_path):
    cells = run(DOCS / page, tmp_path)
    assert sum(bool(cell.expected) for cell in cells) >= 3


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.parametrize(("page", "made"), [("own_images.md", "report.html"), ("laptop_to_pod.md", "certificate.json")])
def test_a_page_that_trains(page, made, tmp_path):
    cells = run(DOCS / page, tmp_path)
    assert sum(bool(cell.expected) for cell in cells) >= 3 and (tmp_path / "run" / made).exists()


@pytest.mark.slow
@pytest.mark.x64_off
@pytest.mark.parametrize("page", everyday(SHORT, "shipping.md"))
def test_short_pages(page, tmp_path):
    cells = run(DOCS / page, tmp_path)
    assert any(cell.expected for cell in cells)


def test_no_other_page_is_meant_to_be_executed():
    assert {page.name for page in DOCS.glob("*.ipynb")} == {"theory.ipynb"}
    said = ("test_docs.py` executes it", "test_docs.py` executes this page", "test_docs.py`\nexecutes it")
    meant = {page.name for page in DOCS.glob("*.md") if any(text in page.read_text() for text in said)}
    assert meant == {
        *(
            "add_a_layer.md",
            "break_a_certificate.md",
            "first_certificate.md",
            "laptop_to_pod.md",
            "own_images.md",
            "ship_it.md",
        ),
        *("your_network.md", *SHORT),
    }


@pytest.mark.parametrize(
    ("expected", "actual", "tolerance", "same"),
    [
        ("norm 1.23, proved\n", "norm   1.24, proved", 0.0, True),
        ("norm 1.23", "norm 1.25", 0.0, False),
        ("norm 1.23", "norm 1.25", 0.02, True),
        ("12 layers", "13 layers", 0.0, False),
        ("1.5e-10 above", "1.6e-10 above", 0.0, True),
        ("1.5e-10 above", "1.5e-9 above", 0.0, False),
        ("at -0.5", "at 0.5", 0.0, False),
        ("proved in ... s", "proved in 12.3 s", 0.0, True),
        ("first\n...\nlast", "first\na 1\nb 2\nlast", 0.0, True),
        ("first\n...\nlast", "first\na 1", 0.0, False),
        ("word", "word more", 0.0, False),
        ("", "something", 0.0, False),
        ("", "\n", 0.0, True),
    ],
)
def test_texts_are_compared_word_by_word(expected, actual, tolerance, same):
    assert execute.same_text(expected, actual, tolerance) == same


def test_a_page_that_has_rotted_is_found_and_written_anew(tmp_path, capsys):
    page, notebook = tmp_path / "page.md", tmp_path / "page.ipynb"
    page.write_text(
        "```python\nx = 2\nprint(x / 3)\n```\n\n```text\n0.5\n```\n\nText.\n\n```python\nx\n```\n\n"
        "```python\nprint(x)\n```\n\n```python\nprint(x)\n```\n\n```text tolerance=0.5\n3\n```\n\n"
        "```sh\nmake coffee\n```\n"
    )
    cells = execute.read(page)
    with pytest.raises(ValueError, match="line 28: expected a line `python -m lipjax"):
        list(execute.execute(cells))
    assert [cell.agrees for cell in cells[:4]] == [False, True, False, True]
    page.write_text(page.read_text().split("```sh")[0])
    sources = ["import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "print('a')\n'b'", "'c';"]
    code = [
        {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source.splitlines(True)}
        for source in sources
    ]
    notebook.write_text(json.dumps({"cells": [*code, {"cell_type": "markdown", "metadata": {}, "source": ["d"]}]}))
    assert execute.main([str(page), str(notebook)]) == 0
    assert capsys.readouterr().err.count("prints or draws something else") == 4
    assert page.read_text() == (
        "```python\nx = 2\nprint(x / 3)\n```\n\n```text\n0.6666666666666666\n```\n\nText.\n\n```python\nx\n```\n\n"
        "```python\nprint(x)\n```\n\n```text\n2\n```\n\n"
        "```python\nprint(x)\n```\n\n```text tolerance=0.5\n3\n```\n\n"
    )
    first, second, third, _ = json.loads(notebook.read_text())["cells"]
    assert list(first["outputs"][0]["data"]) == ["image/png"] and not third["outputs"]
    assert [out["output_type"] for out in second["outputs"]] == ["stream", "execute_result"]
    before = page.read_bytes(), notebook.read_bytes()
    assert execute.main([str(page), str(notebook)]) == 0
    assert capsys.readouterr().err == "" and (page.read_bytes(), notebook.read_bytes()) == before
    assert execute.main([]) == 2 and "page" not in sys.modules
