"""Comparisons: records of runs, tables and pictures of them, and the benchmark that makes and resumes many runs."""

import json
import shlex

import compare_results
import pytest

from benchmarks import compare
from lipjax.errors import UserError
from lipjax.evaluation import records
from lipjax.training import clock
from lipjax.training.config_file import read_config

REPORT = {
    "radii": [36 / 255, 1.0],
    "clean_accuracy": 0.75,
    "certified_accuracy": {"0.141176": 0.5, "1": 0.125},
    "float32_certified_accuracy": None,
    "attacked_accuracy": {"0.141176": 0.625, "1": 0.25},
    "num_images": 1000,
    "of": 10_000,
    "num_attacked_images": 8,
    "step": 8,
}
CLOCK = [  # the second epoch was interrupted, and half of its steps not measured
    {"step": 4, "steps": 3, "seconds": 30.0, "processor_seconds": 60.0},
    {"step": 8, "steps": 2, "seconds": 60.0, "processor_seconds": 90.0},
]


def write_run(directory, report=REPORT, lines=CLOCK):
    """The files of a run of two epochs of four steps."""
    directory.mkdir(parents=True, exist_ok=True)
    config, _ = read_config("digits", [])
    (directory / "config.json").write_text(json.dumps({"config": json.loads(config.to_json_best_effort()), "seed": 0}))
    (directory / "report.json").write_text(json.dumps(report))
    (directory / "clock.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"step": 4, "split": "validation", "accuracy": 0.5, "certified_accuracy_estimate": 0.25}]
    rows += [{"step": 8, "split": "train", "accuracy": 0.9, "certified_accuracy_estimate": 0.8}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "spl')


def test_a_record_has_the_time_of_all_steps_by_those_that_were_measured(tmp_path):
    write_run(tmp_path)
    found = records.record("net", 3, 36 / 255, REPORT, tmp_path)
    # 4 steps of 10 and 20 s, and 4 of 30 and 45 s.
    assert found["training"] == {
        "minutes": 160 / 60,
        "processor_minutes": 260 / 60,
        "epochs": 2,
        "epoch_seconds": 80.0,
        "epoch_processor_seconds": 130.0,
    }
    assert found["curve"] == [[4, 40 / 60, 80 / 60, 0.5, 0.25]]
    assert (found["proved"], found["float32"], found["attacked"]) == ([0.5, 0.125], None, [0.625, 0.25])
    assert found["frontier"] == []
    images = [(0, 0, 0.25), (0, 0, 0.5), (1, 0, 0.75), (1, 1, 0.0)]  # label, prediction, radius
    images = [dict(zip(("label", "prediction", "radius"), image, strict=True)) for image in images]
    (tmp_path / "certificate.json").write_text(json.dumps({"images": images}))
    found = records.record("net", 3, 36 / 255, REPORT, tmp_path)
    assert len(found["frontier"]) == 65 and found["frontier"][0] == [0.0, 0.5] and found["frontier"][-1] == [1.25, 0.0]
    assert [[0.234375, 0.5], [0.253906, 0.25]] == [p for p in found["frontier"] if 0.22 < p[0] < 0.27]
    json.dumps(found, allow_nan=False)
    with pytest.raises(UserError, match="report.json is damaged"):
        records.record("net", 3, None, {**REPORT, "certified_accuracy": {"1": 0.5}}, tmp_path)
    assert records.training_time(clock.read_clock(tmp_path / "nothing")) is None


def test_epochs_without_a_line_of_the_clock_count(tmp_path):
    write_run(tmp_path, lines=CLOCK[1:])  # no step of the first epoch was measured
    found = records.record("net", 0, 36 / 255, REPORT, tmp_path)
    assert found["training"] == {  # 8 steps of 30 and 45 s
        "minutes": 240 / 60,
        "processor_minutes": 360 / 60,
        "epochs": 2,
        "epoch_seconds": 120.0,
        "epoch_processor_seconds": 180.0,
    }
    assert found["curve"] == [[4, 2.0, 3.0, 0.5, 0.25]]
    write_run(tmp_path, lines=CLOCK[:1])  # nor of the last one, whose line of metrics.jsonl is lost, too
    (tmp_path / "metrics.jsonl").unlink()
    found = records.record("net", 0, 36 / 255, REPORT, tmp_path)["training"]
    assert (found["minutes"], found["epochs"], found["epoch_seconds"]) == (80 / 60, 2, 40.0)  # of 10 s


def test_cells_show_all_digits_of_integers_and_three_of_measurements():
    cell = records.number("n")
    shown = {701_888: "701,888", 1_573_120: "1,573,120", 0: "0", 1808.14: "1,810", 0.29225: "0.292", 157.87: "158"}
    assert {value: cell({"n": value}) for value in shown} == shown
    assert cell({"n": None}) == cell({}) == records.NOT_MEASURED


def test_tables_and_pictures_of_records(tmp_path):
    write_run(tmp_path)
    first = records.record("net", 0, 36 / 255, REPORT, tmp_path)
    second = {**first, "name": "a|b", "training": None, "curve": [], "attacked": None}
    table = records.markdown([first, second]).splitlines()
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    cells = [cell.strip() for cell in table[2].split("|")]
    assert {"net", "75.00", "50.00 / 12.50", "62.50 / 25.00", "1,000 (8)", "4.33", "130"} <= set(cells)
    assert "proved at 36/255, 1" in table[0] and "float32" not in table[0]  # no run has that number
    assert records.markdown([]) == "Nothing is measured yet.\n"
    with pytest.raises(UserError, match="different radii"):
        records.markdown([first, {**second, "radii": [0.1, 0.2]}])
    records.plot_radii(tmp_path / "radii.png", [first, second])
    records.plot_minutes(tmp_path / "minutes.png", [first, second])
    for name in ("radii.png", "minutes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="validated at different radii"):
        records.plot_minutes(tmp_path / "minutes.png", [first, {**first, "epsilon": 1.0}])


def test_lines_of_one_run_have_one_colour_and_one_label():
    runs = [
        {"name": name, "seed": seed} for name, seed in (("a", 0), ("b", 0), ("a", 1), *((n, 0) for n in "cdefghijk"))
    ]
    a, b, again, *others = records._styles(runs)
    assert a["label"] == "a, seeds 0, 1" and b["label"] == "b, seed 0"
    assert "label" not in again and again["alpha"] < 1 and again["color"] == a["color"] != b["color"]
    assert others[-1]["color"] == a["color"] and others[-1]["linestyle"] != a["linestyle"]  # the eleventh run
    looks = [(style["color"], style["linestyle"]) for style in (a, b, *others)]
    assert len(set(looks)) == len(looks) == 11


def test_the_clock_counts_steps_alone(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock.time, "process_time", lambda: 2 * now[0])
    found = clock.Clock(tmp_path)

    def pass_time(seconds):
        now[0] += seconds

    found.begin()
    pass_time(100.0)  # compilation, and the first step
    found.begin()
    found.step()
    pass_time(3.0)
    found.step()
    found.epoch(2)
    pass_time(50.0)  # validation
    found.begin()
    pass_time(4.0)
    found.step()
    found.epoch(3)
    found.epoch(6)  # none of its steps was measured
    before, line = clock.read_clock(tmp_path)
    assert before == {"step": 2, "steps": 1, "seconds": 3.0, "processor_seconds": 6.0}
    assert line == {"step": 3, "steps": 1, "seconds": 4.0, "processor_seconds": 8.0}
    with (tmp_path / "clock.jsonl").open("a") as file:
        file.write('{"step": 9, "steps": 3, "seconds": 1.0, "processor_seconds": 1.0}\n{"step": 12')
    clock.Clock(tmp_path, resume_step=3)  # what a later step wrote comes again
    assert clock.read_clock(tmp_path) == [before, line]
    clock.Clock(tmp_path)
    assert clock.read_clock(tmp_path) == []


def test_budgets():
    assert compare.parse_budget("10 epochs") == (10.0, "epochs")
    assert compare.parse_budget("1 minute") == (1.0, "minutes")
    assert compare.parse_budget("2.5 processor minutes") == (2.5, "processor minutes")
    for text in ("10", "epochs", "2.5 epochs", "-1 minutes", "nan minutes", "3 hours"):
        with pytest.raises(UserError, match="--budget: expected"):
            compare.parse_budget(text)
    step = {"seconds": 0.5, "processor_seconds": 0.75, "steps_per_epoch": 40}
    assert compare.epochs_within(2.0, "minutes", step) == 6  # of 20 s
    assert compare.epochs_within(2.0, "processor minutes", step) == 4  # of 30 s
    assert compare.epochs_within(39.0 / 60, "minutes", step) == 2  # the nearest one
    with pytest.raises(UserError, match="at least an epoch, which takes 0.333 minutes, got 0.3 minutes"):
        compare.epochs_within(0.3, "minutes", step)
    config, _ = read_config("losses:crm", [])
    fields = compare.fields_of_budget(config, 40)
    assert "--config.optimizer.warmup_epochs=4.0" in fields and "--config.loss.weight_start_epoch=12" in fields
    assert "--config.num_epochs=40" in fields and "--config.checkpoint.every_epochs=2" in fields
    given = ["--config.loss.name=crm", "--config.optimizer.schedule=exponential", "--config.optimizer.decay_from=2.0"]
    given += ["--config.num_epochs=10", "--config.loss.weight_growth=1.21", "--config.loss.radius_growth=0.25"]
    config, _ = read_config("digits", given)
    longer, _ = read_config("digits", [*given, *compare.fields_of_budget(config, 20)])
    assert (longer.num_epochs, longer.optimizer.decay_from) == (20, 4.0)
    assert (longer.loss.weight_growth, longer.loss.radius_growth) == pytest.approx((1.1, 0.5))


def test_what_a_child_printed_and_how_it_ended():
    assert compare._last_json('{"old": 1}\n{"seconds": 2}\nWARNING: a thread was left\n\n') == {"seconds": 2}
    for code in (compare.WORK_LEFT, compare.INTERRUPTED, -2, -15, -1):
        with pytest.raises(compare.Stopped):
            compare._failed(code, "", {})
    for code in (-9, -11):
        assert f"signal {-code} " in compare._failed(code, "step 3\n", {})["failed"]
    assert compare._failed(2, "a\nError: no\n", {"load": 1}) == {"failed": "no", "load": 1}


def test_two_comparisons_that_write_one_file_lose_no_row(tmp_path):
    path = tmp_path / "found.json"
    first, second = compare_results.Results(path), compare_results.Results(path)
    for number, results in enumerate((first, second, first, second)):
        results.put({"config": number}, {"config": number, "value": 0})
    second.put({"config": 0}, {"config": 0, "value": 1})
    assert {row["config"]: row["value"] for row in compare_results.Results(path).rows} == {0: 1, 1: 0, 2: 0, 3: 0}


def child_of(log, codes):
    """Stands for `run_child`: notes commands, writes what the real ones write, ends with the next of the codes."""

    def child(command):
        log.append(command)
        if "train" in command:
            code = codes.pop(0) if codes else 0
            if not code:
                write_run(directory_of(command))
            return code, "Error: the loss is NaN\n"
        if "--steps" in command:
            return 0, '...\n{"seconds": 1.0, "processor_seconds": 2.0, "steps_per_epoch": 6}\n'
        if command[-1].startswith("--config"):
            return 0, '{"parameters": 7}\n'
        (compare.pathlib.Path(command[-1]) / "costs.json").write_text('{"parameters": 7}')
        return 0, ""

    return child


def directory_of(command):
    return compare.pathlib.Path(next(a for a in command if a.startswith("--workdir=")).partition("=")[2])


def test_a_comparison_skips_what_is_done_and_goes_on_with_what_was_stopped(tmp_path, monkeypatch):
    path, log, fields = (
        tmp_path / "results" / "found.json",
        [],
        ["--config.data.data_dir=/data", "--config.batch_size=64"],
    )

    commit = ["first"]
    monkeypatch.setattr(compare, "provenance", lambda: {"commit": commit[0], "hardware": "a machine", "load": 0.5})

    def go(configs=("digits", "digits_lipnext"), codes=(), **options):
        log.clear()
        child, results = child_of(log, list(codes)), compare_results.Results(path)
        budget = (1.0, "processor minutes")
        return compare.compare(configs, budget, [0, 1], fields, results, tmp_path / "runs", child=child, **options)

    with pytest.raises(compare.Stopped) as stopped:  # in the second run
        go(codes=[0, compare.WORK_LEFT])
    assert stopped.value.code == compare.WORK_LEFT
    assert [(row["config"], row["seed"]) for row in compare_results.Results(path).rows] == [("digits", 0)]
    row = compare_results.Results(path).rows[0]
    assert row["epochs"] == 5 and row["costs"] == {"parameters": 7} and row["proved"] == [0.5, 0.125]
    assert row["fields"] == ["--config.batch_size=64"] and "/data" not in json.dumps(row)
    assert row["commit"] == "first" and row["hardware"] == "a machine"
    assert {"--config.num_epochs=5", "--config.seeds=(0,)"} < set(shlex.split(row["command"]))
    assert "'--config.seeds=(0,)'" in row["command"]  # a shell takes it
    interrupted = directory_of(log[-1])

    commit[0] = "second"
    assert go(codes=[0, 2]) == ["digits, seed 1, 1 processor minutes: the loss is NaN"]
    assert directory_of(log[0]) == interrupted  # the same directory, without timing steps again
    assert "train" in log[0] and len(compare_results.Results(path).rows) == 4
    assert not any("--steps" in command for command in log)  # as many epochs for all seeds
    commits = {(row["config"], row["seed"]): row["commit"] for row in compare_results.Results(path).rows}
    assert commits["digits_lipnext", 0] == "first, second" and commits["digits_lipnext", 1] == "second"
    assert "Commit first, second; a machine" in compare_results.section(path)
    assert go() == [] and log == []
    assert (
        go(again=True) == []
        and len(log) == 2
        and all("failed" not in row for row in compare_results.Results(path).rows)
    )
    assert len({directory_of(command) for command in log if "train" in command}) == 1

    log.clear()
    elsewhere = {"results": compare_results.Results(path), "workdir": tmp_path / "another", "child": child_of(log, [])}
    assert compare.compare(["digits"], (1.0, "processor minutes"), [2], fields, **elsewhere) == []
    assert "--config.num_epochs=5" in log[0]  # another machine takes the epochs from the rows

    log.clear()
    results = compare_results.Results(path.with_name(f"{path.stem}_costs.json"))
    assert compare.measure_costs(["digits", "compared:xs"], [], results, child=child_of(log, [])) == []
    assert compare.measure_costs(["compared:xs"], [], results, child=child_of(log, [])) == [] and len(log) == 2
    costs = compare_results.section(results.path)
    assert "| xs | 7 |" in costs and costs.count("| digits | 7 |") == 1
    assert costs.count("| digits_lipnext | 7 |") == 1  # of its training alone

    path.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        compare_results.Results(path)


def test_rows_with_other_fields_than_most_say_so(tmp_path, monkeypatch):
    path, usual = tmp_path / "found.json", ["--config.batch_size=64", "--config.optimizer.learning_rate=0.01"]
    monkeypatch.setattr(compare, "provenance", lambda: {"commit": "a", "hardware": "a machine", "load": 0.5})
    for config, fields in (
        ("digits", usual),
        ("digits_lipnext", usual),
        ("compared:xs", [*usual[:1], "--config.optimizer.learning_rate=0.001"]),
        ("compared:xs,aol", usual[1:]),
    ):
        results, child = compare_results.Results(path), child_of([], [])
        compare.compare([config], (1.0, "epochs"), [0], fields, results, tmp_path / "runs", child=child)
    text = compare_results.section(path)
    assert text.count("of training each") == 1
    assert f"1 epochs of training each, {', '.join(f'`{field}`' for field in usual)}." in text
    assert "| digits |" in text and "| digits_lipnext |" in text
    assert "| xs (optimizer.learning_rate=0.001) |" in text and "| xs,aol (batch_size of the config) |" in text


def test_a_signal_reaches_the_child_which_ends_before_its_parent(tmp_path):
    code, output = compare.run_child([compare.sys.executable, "-c", "print('a'); raise SystemExit(3)"])
    assert (code, output) == (3, "a\n")
    script = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(tmp_path / 'saved')!r}, 'w').close(), sys.exit(75)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )

    def stop_when_ready(text, **options):
        raise compare.Stopped(143)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", stop_when_ready)
        with pytest.raises(compare.Stopped):
            compare.run_child([compare.sys.executable, "-c", script])
    assert (tmp_path / "saved").exists()


def test_pages_are_what_the_results_say():
    """Run `python benchmarks/compare.py --page` after new results."""
    for name in compare_results.PAGES:
        page = compare_results.ROOT / name
        text = page.read_text(encoding="utf-8")
        assert compare_results.with_tables(text) == text
        for picture in compare.re.findall(r"\((\S+\.png)\)", text):
            assert (page.parent / picture).exists()
    text = text.replace("<!-- end of table -->", "changed\n<!-- end of table -->", 1)
    assert "changed" in text and "changed" not in compare_results.with_tables(text)


def test_studies_name_configs_that_there_are():
    for configs in compare_results.STUDIES.values():
        assert len(set(configs)) == len(configs)
        for config in configs:
            read_config(config, [])
