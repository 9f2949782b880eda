"""How much processor time tests took when they were last recorded, and which of them are slow for that reason.

Processor time, that of child processes included, hardly depends on what else a machine does; the wall clock does.

Record again, without what was compiled before:
    make test JAX_COMPILATION_CACHE_DIR=$(mktemp -d) PYTEST_ARGS=--junitxml=results.xml
    python tests/helpers/durations.py results.xml
"""

import collections
import json
import os
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

FILE = pathlib.Path(__file__).parents[1] / "durations.json"
SLOW = 0.4
"""Processor seconds from which on a test function, all its cases together, is slow."""
LEAST = 0.2
"""Processor seconds from which on a test function is listed."""
PROPERTY = "processor_seconds"
"""Under which name the report of a test holds them."""


def processor_seconds() -> float:
    """Of this process, and of its children that have ended."""
    return sum(os.times()[:4])


def recorded() -> dict[str, float]:
    """Processor seconds by "tests/<tier>/<file>.py::<function>", of all cases of a function together."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def slow_functions() -> set[str]:
    return {name for name, seconds in recorded().items() if seconds > SLOW}


def slow_items(items: list) -> list:
    """Those of pytest's items that are slow, but of a file without any other test of every day the cheapest one."""
    known = recorded()
    seconds = {item: known.get(item.nodeid.partition("[")[0], 0.0) for item in items}
    slow = [item for item in items if seconds[item] > SLOW]
    files = collections.defaultdict(list)
    for item in items:
        if "nightly" not in item.keywords:
            files[item.path].append(item)
    spared = {min(those, key=seconds.get) for those in files.values()}
    return [item for item in slow if item not in spared]


def from_junit(text: str) -> dict[str, float]:
    """Processor seconds by function, the longest first, of what `pytest --junitxml` writes."""
    seconds = collections.defaultdict(float)
    for case in ElementTree.fromstring(text).iter("testcase"):
        function = case.attrib["name"].partition("[")[0]
        for found in case.iter("property"):
            if found.attrib["name"] == PROPERTY:
                seconds[f"{case.attrib['classname'].replace('.', '/')}.py::{function}"] += float(found.attrib["value"])
    listed = {name: round(value, 1) for name, value in seconds.items() if value >= LEAST}
    return dict(sorted(listed.items(), key=lambda item: (-item[1], item[0])))


if __name__ == "__main__":
    found = from_junit(pathlib.Path(sys.argv[1]).read_text())
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    total = sum(found.values())
    print(f"{len(slow_functions())} slow test functions in {FILE.name}, {total:.0f} processor seconds in all")
