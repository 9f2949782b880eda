"""Form of the source: first lines of docstrings are sentences or noun phrases, and files stay short."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A first line that begins so is half a sentence, whose other half a newcomer has to guess.
QUESTION = re.compile(r"(What|Whether|How|Which|Where|Why)\b")
FILES = [
    *(path for folder in ("lipjax", "configs", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))),
    *sorted((ROOT / "docs").glob("*.py")),
    *sorted(ROOT.glob("*.py")),
]


def half_sentences(source, name):
    """Lines of public docstrings, and of those below assignments, that begin like a question without being one."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("_"):
            continue
        body = getattr(node, "body", None)
        for place, line in enumerate(body if isinstance(body, list) else ()):
            text = line.value.value if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) else None
            above = place == 0 or isinstance(body[place - 1], ast.Assign | ast.AnnAssign)
            if isinstance(text, str) and above and QUESTION.match(text):
                yield f"{name}:{line.lineno}: {text.splitlines()[0]}"


def test_first_lines_of_docstrings_are_whole():
    assert len(FILES) > 100
    assert [line for path in FILES for line in half_sentences(path.read_text(), path.relative_to(ROOT))] == []


@pytest.mark.parametrize(
    "source",
    [
        '"""What this module does."""',
        'def f():\n    """Whether it holds."""',
        'class C:\n    """How it works."""',
        'class C:\n    def f(self):\n        """Which of them."""',
        'X = 1\n"""Where it begins."""',
    ],
)
def test_half_a_sentence_is_noticed(source):
    assert len(list(half_sentences(source, "file"))) == 1
    whole = source.replace('"""', '"""Says: ', 1)
    assert list(half_sentences(whole, "file")) == []  # control


def test_files_stay_short():
    """Under 400 lines, but for checker.py, which is one file that shares nothing."""
    files = [path for folder in ("lipjax", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 250
    long = {path.name: len(path.read_text().splitlines()) for path in files}
    assert {name for name, lines in long.items() if lines >= 400} == {"checker.py"}
