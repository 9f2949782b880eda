"""The command `lipjax`, or `python -m lipjax`: train, certify, check, attack, report, predict, zoo and more."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import lipjax
from lipjax import checker, streams, zoo, zoo_command
from lipjax.attacks import METHODS, OBJECTIVES
from lipjax.errors import MissingExtra, UserError, run_command


def _console(soft_wrap: bool = True) -> Any:
    from rich.console import Console  # here, because `lipjax check` needs none of the packages that training needs

    return Console(soft_wrap=soft_wrap, highlight=False)


def run_directories(workdir: str) -> list[pathlib.Path]:
    """The runs in a directory: itself, or its seed_* folders."""
    root = pathlib.Path(os.path.expanduser(workdir))
    if (root / "config.json").exists():
        return [root]
    seeds = sorted((path.parent for path in root.glob("seed_*/config.json")), key=lambda p: (len(p.name), p.name))
    if not seeds:
        raise UserError(f"{root} holds no training run (no config.json): give the --workdir of train.py.")
    return seeds


def certify(arguments) -> None:
    """Certifies every run in a directory again from its checkpoints."""
    from lipjax.evaluation.evaluate import certify_run
    from lipjax.evaluation.table import print_table, summarize
    from lipjax.files import write_json
    from lipjax.training.config import load_config, validate
    from lipjax.training.terminal import Terminal, progress_of

    console = Terminal(quiet=arguments.quiet)
    directories, found = run_directories(arguments.workdir), []
    for directory in directories:
        config, seed = load_config(directory)
        with config.unlocked():
            if arguments.num_images is not None:
                config.certify.num_images = arguments.num_images
            if arguments.data_dir is not None:
                config.data.data_dir = arguments.data_dir
        validate(config)
        with _kept_programs(config):
            found.append(certify_run(directory, config, seed, console=console))
        print_table(found[-1], console)
        files = "frozen/, certificate.json, images.safetensors, report.json, certified_accuracy.png"
        files += ", attack.json" if found[-1]["num_attacked_images"] else ""
        progress_of(console).print(f"Written to {directory}: {files}")
    if len(found) > 1:
        root = directories[0].parent
        write_json(root / "report.json", summarize(found))
        print_table(summarize(found), console)
        progress_of(console).print(f"Written to {root}: report.json")


def report(arguments) -> None:
    """Writes an HTML page about every certified run in a directory."""
    from lipjax.evaluation.html.page import write_reports

    console = _console()
    for path in write_reports(run_directories(arguments.workdir)):
        console.print(f"Written to {path}", markup=False)


def attack(arguments) -> None:
    """Attacks every certified run in a directory."""
    from lipjax.evaluation.attack_command import attack_run
    from lipjax.evaluation.attack_files import print_findings
    from lipjax.training.config import load_config, validate
    from lipjax.training.terminal import Terminal, progress_of

    console = Terminal(quiet=arguments.quiet)
    fields = {"attack": "method", "attack_images": "num_images"}
    fields |= {f"attack_{name}": name for name in ("objective", "steps", "restarts", "targets", "queries")}
    for directory in run_directories(arguments.workdir):
        config, seed = load_config(directory)
        with config.unlocked():
            config.certify.attack_images = 0
            for field, argument in fields.items():
                if getattr(arguments, argument) is not None:
                    config.certify[field] = getattr(arguments, argument)
            if arguments.data_dir is not None:
                config.data.data_dir = arguments.data_dir
        validate(config)
        with _kept_programs(config):
            findings = attack_run(directory, config, seed, console)
        print_findings(findings, console)
        progress_of(console).print(f"Written to {directory}: attack.json, attack.npz, adversarial.npz", markup=False)


def plan(arguments, overrides: list[str]) -> None:
    """Compiles a config's training step for chips that are not here, and prints what it needs of them."""
    from lipjax.plan.command import read_config, run_plans

    config = read_config(arguments.config, overrides)
    console = _console()
    run_plans(config, arguments.topology.split(","), arguments.images_per_chip, console)


def check(arguments) -> int:
    """Proves the certificates of a directory again, by NumPy alone."""
    with streams.guarded():  # a reader that is gone must not turn "proved" into exit code 1
        try:
            workdir = zoo.located(arguments.workdir)
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
        return checker.run(workdir, arguments.images, arguments.data, arguments.budget)


def predict(arguments) -> None:
    """Classifies image files by a frozen network, and says how far each class is proved."""
    from lipjax.evaluation.predict import predict_files, print_predictions

    directory = pathlib.Path(os.path.expanduser(zoo.located(arguments.workdir)))
    if not (directory / "network.json").exists():
        runs = run_directories(arguments.workdir) if not (directory / "frozen").exists() else [directory]
        if len(runs) > 1:
            raise UserError(f"{directory} holds {len(runs)} runs: name one of them, such as {runs[0]}.")
        directory = runs[0]
    with _kept_programs():
        predictions = predict_files(directory, arguments.files)
    print_predictions(predictions, _console())


def compare(arguments) -> None:
    """Prints a table of runs, or writes it, with pictures."""
    from lipjax.evaluation.compare import print_comparison, read_compared, write_comparison

    runs = []
    for typed in arguments.workdirs:
        folder = zoo.located(typed)
        name = typed if folder != typed else None  # tables name a network of the zoo as it was typed
        runs += [read_compared(directory, name) for directory in run_directories(folder)]
    print_comparison(runs, _console(soft_wrap=False))
    if arguments.write is not None:
        for path in write_comparison(runs, pathlib.Path(os.path.expanduser(arguments.write))):
            _console().print(f"Written to {path}", markup=False)


def train(arguments: list[str]) -> int:
    """Trains, certifies and reports; has flags of its own."""
    import lipjax.training  # noqa: F401  first, because it says which packages are missing
    from lipjax.command import main as train_main

    return train_main(arguments)


def prepare(arguments: list[str]) -> int:
    """Prepares a data set; has flags of its own."""
    from lipjax.training.prepare import main as prepare_main

    return prepare_main(arguments)


def main(argv: list[str] | None = None) -> int:
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except MissingExtra as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="lipjax", description="Proved robustness certificates of image classifiers.")
    parser.add_argument("--version", action="version", version=f"lipjax {lipjax.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    passed_on = {"train": train, "prepare": prepare}
    commands.add_parser("train", help="train, certify and report; its --help shows all fields", add_help=False)
    commands.add_parser("prepare", help="prepare a data set once, to be read without TensorFlow", add_help=False)
    if argv and argv[0] in passed_on:
        return passed_on[argv[0]](argv[1:])
    command = commands.add_parser("certify", help="freeze and certify a trained run, and write what is proved")
    command.add_argument("workdir", help="the --workdir of train.py")
    command.add_argument("--num_images", type=int, help="so many test images, drawn by hash (default: as configured)")
    command.add_argument("--data_dir", help="where the data set lies now (default: as configured)")
    command.add_argument("-q", "--quiet", action="store_true", help="print the table and warnings only")
    command.set_defaults(run=certify)
    command = commands.add_parser(
        "check", help="prove a certificate again with NumPy alone; 1 if something is not proved"
    )
    command.add_argument("workdir", help="a run with frozen/, certificate.json and images.safetensors, or zoo/NAME")
    command.add_argument(
        "--images",
        type=checker.number_of_images,
        metavar="N|all",
        help="how many are evaluated again (default: all whose pixels are at hand)",
    )
    command.add_argument("--data", metavar="FILE", help="npz or safetensors: test_images and test_labels, all of them")
    command.add_argument(
        "--budget",
        type=checker.positive,
        default=1.0,
        metavar="FACTOR",
        help="multiplies the limits of work and memory, for a source that you trust (default: 1)",
    )
    command.set_defaults(run=check)
    command = commands.add_parser("attack", help="try to break the certificates of a run and its Lipschitz bounds")
    command.add_argument("workdir", help="the --workdir of train.py")
    command.add_argument("--method", choices=METHODS, help="default: as configured")
    command.add_argument("--objective", choices=OBJECTIVES, help="what apgd and pgd ascend (default: as configured)")
    command.add_argument("--steps", type=int, help="of each start of an attack (default: as configured)")
    command.add_argument("--restarts", type=int, help="from random starts (default: as configured)")
    command.add_argument("--targets", type=int, help="likeliest rivals to aim at (default: as configured)")
    command.add_argument("--queries", type=int, help="of the Square attack (default: as configured)")
    command.add_argument("--num_images", type=int, help="so many certified images, drawn by hash (default: all)")
    command.add_argument("--data_dir", help="where the data set lies now (default: as configured)")
    command.add_argument("-q", "--quiet", action="store_true", help="print the table and warnings only")
    command.set_defaults(run=attack)
    command = commands.add_parser("report", help="write report.html about a certified run: one page, no other file")
    command.add_argument("workdir", help="the --workdir of train.py")
    command.set_defaults(run=report)
    command = commands.add_parser("predict", help="classes of image files, and how far they are proved")
    command.add_argument("workdir", help="a certified run, zoo/NAME, or a directory of a frozen network alone")
    command.add_argument("files", nargs="+", help="image files, prepared as the images of the run were")
    command.set_defaults(run=predict)
    command = commands.add_parser("compare", help="a table of runs: config differences, validation and test numbers")
    command.add_argument("workdirs", nargs="+", help="runs, or directories of several seeds")
    command.add_argument(
        "--write", metavar="STEM", help="writes STEM.md, STEM.json, STEM_radii.png, STEM_minutes.png, too"
    )
    command.set_defaults(run=compare)
    command = commands.add_parser("zoo", help="certified networks to take home: list, card, add, fetch, retrain")
    zoo_command.add_arguments(command)
    command.set_defaults(run=zoo_command)
    command = commands.add_parser("plan", help="memory, operations and least time of a training step on other chips")
    command.add_argument("--config", required=True, help="as of train.py, fields too: --config.batch_size=2048")
    command.add_argument(
        "--topology", required=True, help="chips, such as v5e:16x16, h200:8 or cpu:8; several by commas"
    )
    command.add_argument("--images_per_chip", type=int, help="sets config.batch_size to so many times the chips")
    command.set_defaults(run=plan)
    with streams.guarded(silent=True):  # --help ends here
        arguments, rest = parser.parse_known_args(argv)
    if arguments.run is plan:
        return _run(lambda: plan(arguments, rest))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.run is check:
        return check(arguments)
    if arguments.run is zoo_command:  # most of which takes none of the packages that training needs
        return run_command(lambda: arguments.act(arguments), "Interrupted.")
    return _run(lambda: arguments.run(arguments))


def _run(command: Callable[[], None]) -> int:
    from lipjax.training.compile_alarm import no_slow_compile_alarm

    with no_slow_compile_alarm():
        return run_command(command, "Interrupted.")


def _kept_programs(config: Any = None) -> Any:
    """A context in which compiled programs are kept for later calls, unless a run's config does not want it."""
    from lipjax.training.compile_cache import kept_programs

    return kept_programs(config is None or config.compilation_cache)


if __name__ == "__main__":
    sys.exit(main())
