"""Executes the pages of docs/ that hold code, in order and in one namespace, and writes what they print and draw.

Run: python docs/execute.py docs/add_a_layer.md docs/your_network.md docs/theory.ipynb

In a Markdown page, blocks of `python` are executed, and lines of `sh` blocks that call `python -m lipjax`. The block
of `text` that follows is what they print; "..." stands for anything, and `text tolerance=0.05` loosens its numbers,
which otherwise agree to the last digit printed. In a notebook, the metadata of a cell hold its tolerance, and the value
of its last expression is shown. Nothing that still agrees is written anew but figures.
tests/system/test_docs.py executes the pages and compares.
"""

import ast
import base64
import contextlib
import dataclasses
import io
import json
import pathlib
import re
import shlex
import sys
import tempfile
import types
from collections.abc import Iterator
from typing import Any

_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TEXT = re.compile(r"\n+```text([^\n]*)\n.*?^```$", re.MULTILINE | re.DOTALL)
_TOLERANCE = re.compile(r"\btolerance=(\S+)")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclasses.dataclass
class Cell:
    """Code of a page: where it is, what it is expected to print and draw, and what it did.

    Attributes: kind: "python", "sh" or "notebook". tolerance: relative, of numbers. figures: how many are expected.
      drawn: PNG files.
    """

    place: str
    kind: str
    source: str
    expected: str = ""
    tolerance: float = 0.0
    figures: int = 0
    printed: str = ""
    value: str | None = None
    drawn: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def output(self) -> str:
        return self.printed + ("" if self.value is None else f"{self.value}\n")

    @property
    def agrees(self) -> bool:
        return same_text(self.expected, self.output, self.tolerance) and self.figures == len(self.drawn)


def same_text(expected: str, actual: str, tolerance: float = 0.0) -> bool:
    """True if two texts have the same words, and numbers that differ by one unit of the last digit at most.

    tolerance: the relative difference that numbers may have, if that is more. "..." in the first stands for anything.
    """

    def pattern(word: str) -> str:
        parts = (".*?".join(map(re.escape, part.split("..."))) for part in _NUMBER.split(word))
        return f"({_NUMBER.pattern})".join(parts)

    words = [pattern(word) for word in expected.split()]
    found = re.fullmatch(r"\s+".join(words), actual.strip(), re.DOTALL)
    if found is None:
        return False
    pairs = zip(_NUMBER.findall(" ".join(expected.split())), found.groups(), strict=True)
    return all(abs(float(a) - float(b)) <= max(_unit(a) * 1.001, tolerance * abs(float(a))) for a, b in pairs)


def _unit(number: str) -> float:
    """One unit of the last digit of a number with a point or an exponent; 0 for integers."""
    mantissa, _, exponent = number.partition("e")
    digits = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - digits) if digits or exponent else 0.0


def _markdown_cells(path: pathlib.Path) -> list[Cell]:
    text, cells, end = path.read_text(), [], -1
    for block in _BLOCK.finditer(text):
        kind, options, body = block.groups()
        if kind in ("python", "sh"):
            line = text.count("\n", 0, block.start()) + 1
            cells.append(Cell(f"{path.name}, line {line}", kind, body))
            end = block.end()
        elif kind == "text" and cells and not text[end : block.start()].strip():
            tolerance = _TOLERANCE.search(options)
            cells[-1].expected, cells[-1].tolerance = body, float(tolerance[1]) if tolerance else 0.0
    return cells


def _notebook_cells(path: pathlib.Path) -> list[Cell]:
    cells = []
    for number, cell in enumerate(json.loads(path.read_text())["cells"], start=1):
        if cell["cell_type"] != "code":
            continue
        outputs = cell["outputs"]
        text = [out["text"] if out["output_type"] == "stream" else out["data"].get("text/plain", "") for out in outputs]
        figures = sum("image/png" in out.get("data", {}) for out in outputs)
        # What stands for a figure where it cannot be shown is no output of the cell.
        text = [t for t, out in zip(text, outputs, strict=True) if "image/png" not in out.get("data", {})]
        expected = "\n".join("".join(part) for part in text)
        tolerance = cell["metadata"].get("tolerance", 0.0)
        place = f"{path.name}, cell {number}"
        cells.append(Cell(place, "notebook", "".join(cell["source"]), expected, tolerance, figures))
    return cells


def read(path: pathlib.Path) -> list[Cell]:
    """The code of a page, in order."""
    return (_notebook_cells if path.suffix == ".ipynb" else _markdown_cells)(path)


def _run_python(cell: Cell, namespace: dict[str, Any]) -> Any:
    tree = ast.parse(cell.source, cell.place)
    last: Any = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, cell.place, "exec"), namespace)
    value = eval(compile(ast.Expression(last.value), cell.place, "eval"), namespace) if last else None
    shown = cell.kind == "notebook" and not cell.source.rstrip().endswith(";")
    return value if shown else None


def _run_shell(cell: Cell) -> None:
    from lipjax import __main__ as command_line

    for line in cell.source.splitlines():
        words = shlex.split(line, comments=True)
        if words[:3] != ["python", "-m", "lipjax"]:
            raise ValueError(f"{cell.place}: expected a line `python -m lipjax ...`, got {line!r}.")
        with contextlib.redirect_stderr(sys.stdout):
            command_line.main(words[3:])


def execute(cells: list[Cell]) -> Iterator[Cell]:
    """Executes the cells of a page in the working directory, and yields each with what it printed and drew."""
    import jax
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x64 = jax.config.read("jax_enable_x64")  # which a page may set
    module = types.ModuleType("page")  # dataclasses look their module up by name
    sys.modules["page"] = module
    try:
        for cell in cells:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                value = _run_shell(cell) if cell.kind == "sh" else _run_python(cell, vars(module))
            cell.printed, cell.value = printed.getvalue(), None if value is None else repr(value)
            for number in plt.get_fignums():
                file = io.BytesIO()
                plt.figure(number).savefig(file, dpi=80, bbox_inches="tight", metadata={"Software": None})
                cell.drawn.append(file.getvalue())
            plt.close("all")
            yield cell
    finally:
        del sys.modules["page"]
        jax.config.update("jax_enable_x64", x64)


def _write_markdown(path: pathlib.Path, cells: list[Cell]) -> None:
    """Puts what was printed into the blocks of text, of cells that print something else than the page says."""
    text = path.read_text()
    ends = [block.end() for block in _BLOCK.finditer(text) if block[1] in ("python", "sh")]
    for start, cell in reversed(list(zip(ends, cells, strict=True))):  # from the last, so that places stay
        if cell.agrees:
            continue
        there = _TEXT.match(text, start)
        options, end = (there[1], there.end()) if there else ("", start)
        block = f"\n\n```text{options}\n{cell.output.rstrip()}\n```" if cell.output.strip() else ""
        text = text[:start] + block + text[end:]
    path.write_text(text)


def _write_notebook(path: pathlib.Path, cells: list[Cell]) -> None:
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, (there, cell) in enumerate(zip(code, cells, strict=True), start=1):
        there["execution_count"] = count
        texts = [out for out in there["outputs"] if "image/png" not in out.get("data", {})]
        if not same_text(cell.expected, cell.output, cell.tolerance):
            texts = []
            if cell.printed:
                texts.append({"output_type": "stream", "name": "stdout", "text": cell.printed.splitlines(True)})
            if cell.value is not None:
                data = {"text/plain": cell.value.splitlines(True)}
                texts.append({"output_type": "execute_result", "data": data, "metadata": {}})
        for out in texts:
            if out["output_type"] == "execute_result":
                out["execution_count"] = count
        images = [base64.b64encode(png).decode() for png in cell.drawn]
        figure = {"output_type": "display_data", "metadata": {}}
        there["outputs"] = texts + [{**figure, "data": {"image/png": image}} for image in images]
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def main(paths: list[str]) -> int:
    for path in map(pathlib.Path, paths):
        path, cells = path.resolve(), read(path)
        with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
            for cell in execute(cells):
                if not cell.agrees:
                    print(f"{cell.place} prints or draws something else than the page says.", file=sys.stderr)
        (_write_notebook if path.suffix == ".ipynb" else _write_markdown)(path, cells)
    return 0 if paths else print(__doc__, file=sys.stderr) or 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
