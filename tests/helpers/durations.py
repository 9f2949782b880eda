"""How long tests took when they were last recorded, and which of them are slow for that reason.

Record again: python -m pytest --numprocesses=auto --dist=loadfile --junitxml=results.xml
              python tests/helpers/durations.py results.xml
"""

import collections
import json
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

FILE = pathlib.Path(__file__).parents[1] / "durations.json"
SLOW = 3.0
"""Seconds from which on a test function, all its cases together, is slow."""
LEAST = 0.5
"""Seconds from which on a test function is listed."""


def recorded() -> dict[str, float]:
    """Seconds by "tests/<tier>/<file>.py::<function>", of all cases of a function together."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def slow_functions() -> set[str]:
    return {name for name, seconds in recorded().items() if seconds > SLOW}


def from_junit(text: str) -> dict[str, float]:
    """Seconds by function, the longest first, of what `pytest --junitxml` writes."""
    seconds = collections.defaultdict(float)
    for case in ElementTree.fromstring(text).iter("testcase"):
        function = case.attrib["name"].partition("[")[0]
        seconds[f"{case.attrib['classname'].replace('.', '/')}.py::{function}"] += float(case.attrib["time"])
    listed = {name: round(value, 1) for name, value in seconds.items() if value >= LEAST}
    return dict(sorted(listed.items(), key=lambda item: (-item[1], item[0])))


if __name__ == "__main__":
    FILE.write_text(json.dumps(from_junit(pathlib.Path(sys.argv[1]).read_text()), indent=1) + "\n")
    print(f"{len(slow_functions())} slow test functions in {FILE.name}")
