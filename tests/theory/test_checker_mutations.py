"""Random changes of honest certificates: each ends in a verdict, and what is accepted says no more than before."""

import json
import math
import random
import resource
import shutil
import time

import numpy as np
import pytest
from checker_helpers import Forger, draw, honest_runs, linear_head, write_run
from tiers import everyday

from lipjax import checker, operators
from lipjax.network import make_network


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return honest_runs(tmp_path_factory)


def tiny_run(directory):
    """A certificate with LipLT, a convolution and biases of a few kilobytes."""
    rng = np.random.default_rng(9)
    ops = [
        ("conv", operators.Conv(draw(rng, 3, 3, 1, 2), (4, 4, 1), 2)),
        ("bias", operators.Bias(0.1 * rng.normal(size=2), (2, 2, 2))),
        ("act", operators.ReLU((2, 2, 2))),
        ("flat", operators.Flatten((2, 2, 2))),
        ("dense", operators.Dense(draw(rng, 4, 8))),
        ("again", operators.LeakyReLU((4,), 0.25)),
    ]
    write_run(directory, make_network(ops, linear_head(rng, 3, 4), 0.2, 0.5))
    return directory


JUNK = [None, True, -1, 0, 1, 2, 1e300, -0.0, 10**30, 0.5, "", "zero", [], {}, [[]], [1, 1], [10**6, 10**6], "ReLU"]


def places_of(value, path=()):
    """The paths to all values of a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_of(inner, (*path, key))


def changed_json(document, rng):
    """One value replaced, moved a little, removed, doubled or swapped; None where nothing has changed."""
    text = json.dumps(document)
    document = json.loads(text)
    path = rng.choice([p for p in places_of(document) if p])
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], parent[path[-1]]
    way = rng.randrange(6)
    if way == 0 and type(value) in (int, float):
        parent[key] = value * rng.choice([1 - 1e-3, 1 + 1e-3, 0.5, 2, -1]) + rng.choice([0, 0, 1])
    elif way == 1 and isinstance(value, float):
        parent[key] = math.nextafter(value, rng.choice([-math.inf, math.inf]))
    elif way == 2:
        del parent[key]
    elif way == 3 and isinstance(parent, list):
        parent.append(value)
    elif way == 4 and isinstance(parent, list):
        parent.reverse()
    else:
        parent[key] = rng.choice(JUNK)
    return None if json.dumps(document) == text else document


def changed_bytes(data, rng):
    """Bits flipped, a piece left out, doubled, or the end."""
    data = bytearray(data)
    way, place = rng.randrange(4), rng.randrange(len(data))
    if way == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif way == 1:
        del data[place : place + rng.choice([1, 2, 8, 40])]
    elif way == 2:
        data[place:place] = data[place : place + rng.choice([1, 8, 64])]
    else:
        del data[place:]
    return bytes(data)


def changed_arrays(f, rng):
    """Entries of an array changed, or its shape or type; hashes as an attacker would write them."""
    table = rng.choice([f.arrays, f.images])
    name = rng.choice(sorted(table))
    array, way = table[name].copy(), rng.randrange(4)
    if way == 0 and array.size:
        flat = array.reshape(-1)
        flat[rng.randrange(flat.size)] = rng.choice([0, 1, 200] if array.dtype.kind in "ui" else [0.0, 1e9, np.nan])
    elif way == 1:
        array = array.reshape(-1)
    elif way == 2:
        array = np.ascontiguousarray(array[:-1])
    else:
        array = array.astype(rng.choice([np.float32, np.float64, np.int64, np.uint8]))
    table[name] = array


def claims(directory):
    """What a directory states: upper bounds, lower bounds, and what must stay as it is."""
    f = Forger(directory)
    chains, layers = f.certificate["liplt"]["chains"], f.certificate["layers"]
    upper = [
        [row["bound"] for row in layers],
        f.constants,
        {(row["start"], row["end"]): row["bound"] for row in chains},
        [(row["bound"], row["product"]) for row in f.certificate["liplt"]["layers"]],
    ]
    lower = [(row["margin"], row["radius"]) for row in f.rows]
    for key, share in f.report["certified_accuracy"].items():  # these follow from the rows, whatever they are
        right = [row["label"] == row["prediction"] and row["radius"] > float(key) for row in f.rows]
        assert share <= np.mean(right), key
    fixed = [[(row["name"], row["type"]) for row in layers], f.certificate["claim"], f.certificate["head"]]
    fixed += [[(row["label"], row["prediction"], row["rival"]) for row in f.rows], f.report["clean_accuracy"]]
    fixed += [f.report["num_images"], f.layout["ops"], f.certificate["data"]["sha256"]]
    fixed += [{k: (a.dtype.str, a.shape, a.tobytes()) for k, a in {**f.arrays, **f.images}.items()}]
    return upper, lower, fixed


def at_least(first, second) -> bool:
    """Whether all numbers of a structure are at least those of another one of its form; None is less than any."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(at_least(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(at_least(a, b) for a, b in zip(first, second, strict=True))
    return second is None or (first is not None and first >= second)


def mutate(honest, directory, rng):
    """A copy of an honest directory with one to three random changes."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(honest, directory)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind = rng.randrange(4)
        if kind == 0:
            path = rng.choice(sorted(p for p in directory.rglob("*") if p.is_file()))
            if data := path.read_bytes():
                path.write_bytes(changed_bytes(data, rng))
            continue
        try:
            f = Forger(directory)
            if kind == 1:
                changed_arrays(f, rng)
            else:
                name = rng.choice(["layout", "certificate", "certificate", "certificate", "report"])
                setattr(f, name, changed_json(getattr(f, name), rng) or getattr(f, name))
            f.write(hashes=rng.random() < 0.8, report=False)
        except Exception:  # no longer a run that the forger reads
            continue


def check_mutations(honest, directory, count, seed):
    rng, codes = random.Random(seed), [0, 0, 0]
    upper, lower, fixed = claims(honest)
    for number in range(count):
        mutate(honest, directory, rng)
        code, lines = checker.check(directory)
        codes[code] += 1
        assert lines and all(isinstance(line, str) and len(line) <= 1000 for line in lines)
        if code == 0:
            now = claims(directory)
            assert at_least(now[0], upper) and at_least(lower, now[1]) and now[2] == fixed, number
    return codes


@pytest.mark.parametrize("count", everyday([250, 1000], 250))
def test_mutations_end_in_verdicts(tmp_path, count):
    honest = tiny_run(tmp_path / "honest")
    assert checker.check(honest)[0] == 0
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codes = check_mutations(honest, tmp_path / "changed", count, seed=0)
    print(codes, time.process_time() - start)
    # Control: what is changed matters.
    assert codes[1] > 0.2 * count and codes[2] > 0.2 * count and codes[0] < 0.3 * count
    assert time.process_time() - start < 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024  # kilobytes on Linux


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["mlp_network", "many_operators", "residual_network", "potential_network"])
def test_more_mutations(runs, tmp_path, name):
    codes = [0, 0, 0]
    for seed in range(500):
        mutate(runs(name), tmp_path / "changed", random.Random(seed))
        codes[checker.check(tmp_path / "changed")[0]] += 1
    assert codes[1] > 50 and codes[2] > 50
