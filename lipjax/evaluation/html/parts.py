"""Building blocks of pages: escaped tags, tables, inline SVG and PNG images, numbers rounded to the safe side."""

import base64
import decimal
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

DASH = "–"
_VOID = ("img", "meta")

# Figures are drawn in these colours, which become those of the style sheet: one figure serves light and dark.
INK, MUTED, LINE, PROVED, ATTACKED, BETWEEN, SINGLE = (f"#01020{digit}" for digit in range(7))
_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PROVED: "var(--proved)",
    ATTACKED: "var(--attacked)",
    BETWEEN: "var(--between)",
    SINGLE: "var(--single)",
}

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --card: #ffffff; --ink: #1b1b1a; --muted: #62615c; --line: #dddcd6;
  --proved: #1f66c0; --attacked: #c2521b; --between: #efe6d8; --code: #f2f1ec;
  --single: #a31f6a; --clean: #cfcdc4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #171716; --card: #20201e; --ink: #ecebe6; --muted: #a5a39b; --line: #3b3a36;
    --proved: #6aa7f5; --attacked: #ef8a56; --between: #37312a; --code: #2a2a27; --single: #f08ac2;
    --clean: #5a5850; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif;
  overflow-wrap: break-word; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; margin: .5rem 0; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p, li, blockquote { max-width: 44rem; }
a { color: var(--proved); }
blockquote { margin: .75rem 0; padding: .1rem 0 .1rem 1rem; border-left: 3px solid var(--proved); }
.muted, figcaption { color: var(--muted); font-size: .875rem; }
code, pre { font: .875em/1.5 ui-monospace, monospace; background: var(--code); border-radius: 4px; }
code { padding: .1em .3em; overflow-wrap: anywhere; }
pre { padding: .75rem 1rem; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 11rem), 1fr)); gap: .75rem;
  padding: 0; margin: 1.25rem 0; list-style: none; }
.tiles li, .cards > li { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .75rem 1rem; }
.tiles strong { display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 600; }
.scroll { overflow-x: auto; max-width: 100%; margin: .25rem 0; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--proved); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .35rem 1.1rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 500; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.long { white-space: normal; min-width: 15rem; overflow-wrap: anywhere; }
td small { color: var(--muted); }
th:last-child, td:last-child { padding-right: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.25rem 2rem;
  margin: 1rem 0; }
figure { margin: .75rem 0; min-width: 0; }
.figures figure, .trio figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 36rem; }
figure svg text { font-family: system-ui, sans-serif !important; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: .75rem;
  padding: 0; list-style: none; }
.cards p { margin: .5rem 0 0; font-size: .9rem; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; }
.trio img { display: block; width: 100%; height: auto; image-rendering: pixelated; border: 1px solid var(--line); }
.bar { height: 6px; margin-top: .6rem; border-radius: 3px; background: var(--between); overflow: hidden; }
.bar span { display: block; height: 100%; background: var(--proved); }
.classes { display: grid; grid-template-columns: fit-content(35%) 1fr max-content; gap: .35rem .75rem;
  align-items: center; max-width: 44rem; font-size: .9rem; padding: 0; list-style: none; }
.classes > li { display: contents; }
.classes .level { position: relative; height: 1rem; border-radius: 3px; background: var(--code); overflow: hidden; }
.level span { position: absolute; inset: 0 auto 0 0; background: var(--proved); }
.level .clean { background: var(--clean); }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; font-size: .875rem;
  color: var(--muted); }
.key .level { display: inline-block; position: relative; width: 1.1rem; height: .8rem; margin-right: .4rem;
  overflow: hidden; border-radius: 2px; vertical-align: -.05rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); gap: .3rem 1.25rem;
  font-size: .9rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  td small { display: block; } .tiles strong { font-size: 1.35rem; } .tiles li { padding: .6rem .75rem; }
  table { font-size: .8rem; } th, td { padding-right: .45rem; } tbody th { white-space: normal; }
  .matrix thead th:not(:first-child) { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
    padding: .55rem 0 0; }
  .matrix th, .matrix td { padding-right: .4rem; }
  .wide { font-size: .9rem; } .wide thead { display: none; }
  .wide tr, .wide td, .wide tbody th { display: block; } .wide tbody th { font-weight: 600; }
  .wide tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  .wide td, .wide tbody th { border: 0; padding: .1rem 0; white-space: normal; text-align: left; min-width: 0; }
  .wide td::before { content: attr(data-label) ": "; color: var(--muted); } }
@media print { .scroll { overflow: visible; } }
"""


class Markup(str):
    """Text that is HTML already. Any other text is escaped where it enters a page."""


def join(*parts: Any) -> Markup:
    """One piece of HTML from pieces and from plain text, which is escaped; None adds nothing."""
    texts = (part if isinstance(part, Markup) else html.escape(str(part)) for part in parts if part is not None)
    return Markup("".join(texts))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Attributes in Python's spelling (class_, aria_label); those that are None are left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = Markup(f"<{name}{written}>")
    return start if name in _VOID else join(start, *children, Markup(f"</{name}>"))


def document(title: str, *content: Any) -> str:
    """A whole page that needs nothing else: no script, no other file, no network."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", *content)), lang="en") + "\n"


def section(title: str, *content: Any) -> Markup:
    return tag("section", tag("h2", title), *content)


def folded(summary: str, *content: Any) -> Markup:
    return tag("details", tag("summary", summary), *content)


def table(
    caption: str, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]], style: str | None = None
) -> Markup:
    """A table that scrolls inside its own box.

    Args: columns: title and kind, "number", "long" or "". rows: one value per column; the first names its row.
      style: on narrow screens; "matrix": titles stand upright. "wide", as with a "long" column: rows become blocks.
    """
    kinds = [kind or None for _, kind in columns]
    wide = style == "wide" or "long" in kinds
    head = [tag("th", title, scope="col", class_=kind) for (title, _), kind in zip(columns, kinds, strict=True)]
    body = []
    for first, *others in rows:
        titles = [title if wide else None for title, _ in columns[1:]]
        pairs = zip(others, kinds[1:], titles, strict=True)
        cells = [tag("td", value, class_=kind, data_label=title) for value, kind, title in pairs]
        body.append(tag("tr", tag("th", first, scope="row", class_=kinds[0]), *cells))
    content = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), class_="wide" if wide else style)
    box = tag("div", content, class_="scroll", role="region", aria_label=caption, tabindex="0")
    return tag("figure", tag("figcaption", caption), box)


def definitions(pairs: Iterable[tuple[str, Any]]) -> Markup:
    return tag("dl", *(part for name, value in pairs for part in (tag("dt", name), tag("dd", value))))


def flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as pairs of a dotted name and a text."""
    pairs = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            pairs += flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", str(value)))
    return pairs


def percent(count: int, total: int) -> str:
    return f"{100 * count / total:.2f} %"


def _rounded(value: float, digits: int, rounding: str) -> str:
    exact = decimal.Context(prec=digits, rounding=rounding).create_decimal(decimal.Decimal(value))
    return f"{float(exact):.{digits}g}"


def up(value: float, digits: int = 6) -> str:
    """An upper bound with a few digits, rounded up; just above 1 as "1 + 7.2e-14"."""
    if 1 < value < 1 + 1e-4:
        return f"1 + {_rounded(value - 1, 2, decimal.ROUND_CEILING)}"
    return _rounded(value, digits, decimal.ROUND_CEILING)


def down(value: float, digits: int = 4) -> str:
    """A lower bound with a few digits, rounded down; just below 1 as "1 − 7.2e-14"."""
    if 1 - 1e-4 < value < 1:
        return f"1 − {_rounded(1 - value, 2, decimal.ROUND_CEILING)}"
    return _rounded(value, digits, decimal.ROUND_FLOOR)


def figure(name: str, alternative: str, caption: str, draw: Callable[[Any], None]) -> Markup:
    """A figure that `draw` puts on matplotlib axes, as inline SVG with a text alternative.

    Args: name: unlike those of the page's other figures. alternative: the content in words.
    """
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "lipjax", "font.size": 10, "legend.frameon": False}
    options |= {f"{key}.color": INK for key in ("text", "xtick", "ytick")}
    options |= {"axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.facecolor": "none", "grid.color": LINE}
    options |= {"axes.spines.top": False, "axes.spines.right": False, "xtick.color": MUTED, "ytick.color": MUTED}
    options |= {"xtick.labelcolor": INK, "ytick.labelcolor": INK}
    import matplotlib  # here, because it takes half a second
    from matplotlib.figure import Figure

    with matplotlib.rc_context(options):
        made = Figure(figsize=(4.8, 3.4), layout="constrained", facecolor="none")
        axes = made.add_subplot()
        draw(axes)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:  # above the axes, where no curve is
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, columnspacing=1.5, handlelength=1.5
            )
        written = io.StringIO()
        made.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = written.getvalue()
    for drawn, shown in _COLOURS.items():
        svg = svg.replace(drawn, shown)
    view = re.search(r'viewBox="([^"]*)"', svg)
    inner = re.search(r"<svg[^>]*>(.*)</svg>", svg, re.DOTALL)
    if view is None or inner is None:
        raise ValueError("Expected an <svg> element with a viewBox from matplotlib.")
    content = re.sub(r"<style.*?</style>", "", inner[1], flags=re.DOTALL).replace("xlink:href", "href")
    # Every figure numbers its parts alike.
    content = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", content)
    image = tag("svg", Markup(content), viewBox=view[1], role="img", aria_label=alternative)
    return tag("figure", image, tag("figcaption", caption))


def png(pixels: np.ndarray) -> str:
    """An image (h, w, c) in [0, 1] as the data URI of a PNG, its pixels enlarged to squares.

    One channel is grey, three are RGB; of other numbers of channels the mean is shown.
    """
    if pixels.shape[2] != 3:
        pixels = pixels.mean(axis=2, keepdims=True)
    shown = np.round(255 * np.clip(np.nan_to_num(pixels), 0, 1)).astype(np.uint8)
    factor = max(1, -(-96 // max(shown.shape[:2])))
    large = shown.repeat(factor, axis=0).repeat(factor, axis=1)
    written = io.BytesIO()
    Image.fromarray(large[..., 0] if large.shape[2] == 1 else large).save(written, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
