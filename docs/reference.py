"""The public names of lipjax, and the pages of the API reference that are made of their docstrings.

A name is public if the `__all__` of a public module lists it. conf.py writes the pages when the site is built and fails
if a public name is on none of them; tests/system/test_site.py asks the same of the names alone.
"""

import importlib
import inspect
import pathlib
import re
import types
from collections.abc import Iterator

# Heading -> public modules, in the order of the site. Submodules in a module's `__all__` follow it by themselves.
PARTS = {
    "A frozen network and its certificate": (
        *("lipjax", "lipjax.certify", "lipjax.zoo", "lipjax.shipping", "lipjax.interop", "lipjax.errors"),
    ),
    "From arrays to Lipschitz constants": ("lipjax.operators", "lipjax.spectral", "lipjax.network", "lipjax.bounds"),
    "Layers as functions": (
        *("lipjax.parametrize", "lipjax.linalg", "lipjax.conv", "lipjax.activations", "lipjax.pooling"),
        "lipjax.curvature",
    ),
    "Training": ("lipjax.losses", "lipjax.nn", "lipjax.models", "lipjax.manifold", "lipjax.training"),
    "Attacks": ("lipjax.attacks",),
}


def modules() -> dict[str, list[types.ModuleType]]:
    """Heading -> the public modules below it."""
    return {heading: list(_with_submodules(names)) for heading, names in PARTS.items()}


def _with_submodules(names: tuple[str, ...]) -> Iterator[types.ModuleType]:
    for name in names:
        module = importlib.import_module(name)
        yield module
        if name != "lipjax":  # whose submodules are parts of their own
            yield from (value for value in members(module).values() if isinstance(value, types.ModuleType))


def members(module: types.ModuleType) -> dict[str, object]:
    """Name -> value of what a module says is public: its `__all__`, or what it defines without an underscore."""
    names = getattr(module, "__all__", None)
    if names is None:
        own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
        names = [name for name in own if not name.startswith("_")]
    return {name: getattr(module, name) for name in names}


def public_names() -> list[str]:
    """Every public name that is not a module, as `lipjax.losses.emma`, once for each module that lists it."""
    found = (module for part in modules().values() for module in part)
    return [
        f"{module.__name__}.{name}"
        for module in found
        for name, value in members(module).items()
        if not isinstance(value, types.ModuleType)
    ]


def undocumented() -> list[str]:
    """The public names of functions and classes without a docstring of their own."""
    found = []
    for part in modules().values():
        for module in part:
            for name, value in members(module).items():
                if (inspect.isroutine(value) or inspect.isclass(value)) and not value.__doc__:
                    found.append(f"{module.__name__}.{name}")
    return found


def write_pages(directory: pathlib.Path) -> None:
    """Writes index.rst and a page for each public module into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    index = ["API reference", "=============", "", _INTRODUCTION, ""]
    home: dict[int, str] = {}
    for heading, part in modules().items():
        index += [heading, "-" * len(heading), "", ".. toctree::", "   :maxdepth: 1", ""]
        for module in part:
            _write(directory / f"{module.__name__}.rst", "\n".join(_page(module, home)))
            index.append(f"   {module.__name__}")
        index.append("")
    _write(directory / "index.rst", "\n".join(index))


_INTRODUCTION = """Every public name, from its docstring. ``import lipjax`` loads all of it but ``lipjax.nn``,
``.models``, ``.manifold``, ``.training`` and ``.interop``, which are imported by name. Shapes are (batch, height,
width, channels), and radii are l2 lengths in pixels of [0, 1], unless a name says otherwise. ``x_estimate`` may be
too low; ``x_bound`` is proved."""


def _page(module: types.ModuleType, home: dict[int, str]) -> Iterator[str]:
    """The page of a module. home: id of a value -> the name under which a page before this one has it."""
    title = module.__name__
    yield from (title, "=" * len(title), "", f".. automodule:: {title}", "")
    listed = {name: value for name, value in members(module).items() if not isinstance(value, types.ModuleType)}
    for name, value in sorted(listed.items(), key=lambda item: (inspect.isclass(item[1]), item[0].lower())):
        full = f"{title}.{name}"
        if callable(value) and home.setdefault(id(value), full) != full:
            yield from (f".. py:data:: {name}", "", f"   The same as :py:obj:`{home[id(value)]}`.", "")
        elif inspect.isclass(value):
            yield from (f".. autoclass:: {full}", "   :members:", "")
        elif callable(value):
            yield from (f".. autofunction:: {full}", "")
        else:
            keys = ", ".join(f"``{key}``" for key in value) if isinstance(value, dict) else f"``{value!r}``"
            yield from (f".. py:data:: {name}", "", f"   {keys}", "")
    inner = [value.__name__ for value in members(module).values() if isinstance(value, types.ModuleType)]
    if inner and title != "lipjax":
        yield from ("Modules: " + ", ".join(f":doc:`{name}`" for name in inner) + ".", "")


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a file if its text is new, so that Sphinx reads only what changed."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


_VERBATIM = re.compile(r"`[^`]+`")
_HEADING = re.compile(r"([A-Z][a-z]+):(?: +(.*))?$")
_FIELDS = {"Returns": ":returns:", "Yields": ":yields:", "Raises": ":raises:"}


def as_rst(lines: list[str]) -> list[str]:
    """A docstring of lipjax as reStructuredText, but for `Args:` and `Attributes:`, which napoleon reads.

    It is plain text: `code` stands in single backquotes, *, | and _ mean themselves, and what is indented is shown as
    it is. A heading may go on in its line; what belongs to it is indented by two.
    """
    found: list[str] = []
    for block in _blocks(lines):
        heading = _HEADING.match(block[0])
        name = heading[1] if heading else ""
        if not heading:
            found += _paragraph(block)
        elif name in ("Args", "Attributes"):
            found += [f"{name}:", *map(_escaped, block[1:])]
        elif name == "Example":
            found += [".. rubric:: Example", "", *_example([heading[2] or "", *(line[2:] for line in block[1:])])]
        elif name in _FIELDS:
            found += [f"{_FIELDS[name]} {_escaped(heading[2] or '')}", *map(_escaped, block[1:])]
        else:
            found += [_escaped(line.strip()) for line in block]
        found.append("")
    return found


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """A docstring's paragraphs and its headings, each heading with what is indented below it."""
    block: list[str] = []
    for line in lines:
        inside = bool(block) and _HEADING.match(block[0]) is not None
        if not line.strip() and not inside or line[:1].strip() and (inside or _HEADING.match(line)):
            if any(map(str.strip, block)):
                yield block
            block = []
        if line.strip() or inside:
            block.append(line)
    if any(map(str.strip, block)):
        yield block


def _paragraph(block: list[str]) -> Iterator[str]:
    """Text as text; lines that are indented, formulas mostly, as they are; lists as lists."""
    if block[0].startswith(">>>"):
        yield from block
        return
    item = shown = False
    for line in block:
        item = line.startswith("- ") or item and line.startswith(" ")
        if line.startswith(" ") and not item:
            yield from () if shown else ("", "::", "")
            shown = True
            yield f"    {line}"
            continue
        if shown or line.startswith("- "):
            yield ""
        shown = False
        yield _escaped(line)


def _example(block: list[str]) -> Iterator[str]:
    """Text, then code with what it prints."""
    code = False
    for line in block:
        if line.startswith(">>>") and not code:
            yield ""
            code = True
        code = code and bool(line.strip())
        yield line if code else _escaped(line)


def _escaped(line: str) -> str:
    parts, end = [], 0
    for code in _VERBATIM.finditer(line):
        parts += [re.sub(r"([*|\\]|_\b)", r"\\\1", line[end : code.start()]), f"`{code[0]}`"]
        end = code.end()
    escaped = "".join(parts) + re.sub(r"([*|\\]|_\b)", r"\\\1", line[end:])
    return "\\" + escaped if escaped.startswith("+ ") else escaped  # else a list
