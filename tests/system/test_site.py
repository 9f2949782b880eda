"""The site: every public name has a docstring and a place in the API reference, every page a place in the contents.

`make docs` builds it, with warnings as errors, and looks for every public name in what was built.
"""

import importlib
import json
import pathlib
import pkgutil
import re

import numpy as np
import pytest

import lipjax
from docs import pictures, reference

DOCS = pathlib.Path(__file__).parents[2] / "docs"

# Modules that say what is public in them and are no part of the API: programs, and what reports and plans are made by.
PROGRAMS = {"lipjax.checker", "lipjax.evaluation", "lipjax.plan"}


def test_every_public_name_has_a_docstring(monkeypatch):
    assert len(reference.public_names()) > 300 and reference.undocumented() == []
    monkeypatch.setattr(lipjax.losses.emma, "__doc__", None)  # control
    assert reference.undocumented() == ["lipjax.losses.emma"]


def test_every_room_with_public_names_is_in_the_reference():
    there = {module.__name__ for part in reference.modules().values() for module in part}
    rooms = {f"lipjax.{room.name}" for room in pkgutil.iter_modules(lipjax.__path__) if not room.name.startswith("_")}
    public = {room for room in rooms - PROGRAMS if hasattr(importlib.import_module(room), "__all__")}
    assert len(public) > 15 and public - there == set()


def test_the_pages_name_every_public_name(tmp_path):
    reference.write_pages(tmp_path)
    pages = {path.stem: path.read_text() for path in tmp_path.glob("lipjax*.rst")}
    for name in reference.public_names():
        module, _, short = name.rpartition(".")
        assert re.search(rf"^\.\. (py:data:: {short}|auto\w+:: {re.escape(name)})$", pages[module], re.MULTILINE), name
    index = (tmp_path / "index.rst").read_text().split()
    assert set(pages) <= set(index)


def test_every_page_is_in_the_contents():
    text = (DOCS / "index.md").read_text()
    blocks = re.findall(r"```{toctree}\n(.*?)```", text, re.DOTALL)
    listed = {line.strip() for block in blocks for line in block.split("\n")}
    pages = {path.stem for path in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"))} - {"index"}
    assert pages - listed == set() and {name for name in listed if name and name[0] != ":"} - pages == {"api/index"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Twice x.\n\nReturns: (n,), a_ times *b*.", ["Twice x.", "", ":returns: (n,), a\\_ times \\*b\\*.", ""]),
        ("The norm `|x|`.", ["The norm ``|x|``.", ""]),
        ("A:\n\n    x = |y|\n\nwhere", ["A:", "", "", "::", "", "        x = |y|", "", "where", ""]),
        ("Example: one.\n  >>> f(1)\n  2", [".. rubric:: Example", "", "one.", "", ">>> f(1)", "2", ""]),
    ],
)
def test_a_docstring_becomes_restructured_text(text, expected):
    assert reference.as_rst(text.split("\n")) == expected


def test_pictures_are_those_of_what_lies_here():
    assert (DOCS / "_static" / "discs.png").read_bytes() == pictures.discs()
    drawn = (DOCS / "_static" / "zoo.svg").read_text()
    found = pictures.curves(np.array([0.0, 0.1, 10.0]))
    assert set(found) == set(lipjax.zoo.list()) and all(f"<!-- {name} -->" in drawn for name in found)
    for name, accuracy in found.items():
        report = json.loads((lipjax.zoo.directory(name) / "report.json").read_text())
        assert accuracy[0] == pytest.approx(report["clean_accuracy"]) and accuracy[2] == 0 < accuracy[1] < accuracy[0]


def test_shares_of_devices_are_drawn_as_they_were_read():
    found = json.loads(pictures.SHARES.read_text())
    drawn = (DOCS / "_static" / "scaling.svg").read_text()
    assert set(found["shares"]) == set(pictures.NAMES) and found["devices"] == [8, 16, 64, 256]
    assert all(f"<!-- {name} -->" in drawn for name in pictures.NAMES.values())
    for shares in found["shares"].values():
        assert all(0.95 <= share * count <= 2 for share, count in zip(shares, found["devices"], strict=True))
    lines = re.findall(r'<path d="(M[^"]*?)" clip-path', drawn)
    heights = [[float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", line)] for line in lines]
    heights = [row for row in heights if len(row) == 4][: len(found["shares"])]
    # Logarithms of the shares and heights in the picture are linear in each other: one scale fits all lines.
    shares = np.log([*found["shares"].values()])
    slope, offset = np.polyfit(shares.ravel(), np.ravel(heights), 1)
    np.testing.assert_allclose(slope * shares + offset, heights, atol=1e-3)


def test_cards_without_their_picture_are_left_out(tmp_path):
    text = (DOCS / "index.md").read_text()
    shown = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text)
    assert len(shown) >= 6 and all(len(alternative) > 20 for alternative, _ in shown)
    for folder, kept in ((tmp_path, set()), (DOCS, {name for _, name in shown if (DOCS / name).is_file()})):
        page = pictures.only_there(text, folder)
        assert {name for _, name in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", page)} == kept
        assert page.count(":::{grid-item-card}") == 3 + len(kept) and page.count("::::\n") == text.count("::::\n")
        assert page.count("\n:::\n") == 3 + len(kept)
    (tmp_path / "layers_0_radii.png").write_bytes(b"")
    assert "](layers_0_radii.png)" in pictures.only_there(text, tmp_path)


def test_every_page_opens_with_what_it_lets_you_do():
    shown = {"changelog", "contributing", "golden", "security"}  # files from elsewhere, by docs/conf.py
    pages = {path.stem: path.read_text() for path in DOCS.glob("*.md") if path.stem not in shown}
    first = {name: text.split("\n\n")[1] for name, text in pages.items()}
    assert len(first) > 25
    bad = [name for name, text in first.items() if text.startswith((" ", "#", "|", "-", "`", "!"))]
    assert bad == [], bad
    unsaid = [name for name, text in first.items() if not re.search(r"lets you|two commands|Ten lines|Three", text)]
    assert sorted(unsaid) == ["index", "laptop_to_pod", "zoo"]  # which say it in words of their own
    for name, other, word in (("ship_it", "shipping", "tutorial"), ("shipping", "ship_it", "reference")):
        sentence = re.split(r"\.\s", first[name])[0]
        assert word in sentence and f"]({other}.md)" in sentence, sentence
