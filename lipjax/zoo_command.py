"""The command `lipjax zoo`: lists networks, shows their cards, adds a run, fetches from a URL, trains one again."""

import argparse
import pathlib

from lipjax import zoo
from lipjax.errors import UserError


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of `lipjax zoo`."""
    actions = command.add_subparsers(required=True, metavar="action")
    action = actions.add_parser("list", help="the networks of a zoo, and where they lie")
    action.add_argument("--zoo", help="a folder of networks (default: those that lipjax brings)")
    action.set_defaults(act=_list)
    action = actions.add_parser("card", help="the model card of a network")
    action.add_argument("name", help="a name of `lipjax zoo list`, or the path of a network")
    action.set_defaults(act=lambda found: print(zoo.card(_bare(found.name)), end=""))
    action = actions.add_parser("add", help="make a certified run a network of a zoo, with a model card")
    action.add_argument("workdir", help="the --workdir of train.py, of one seed")
    action.add_argument("name", help="its name in the zoo")
    action.add_argument("--about", required=True, help="a line about the network")
    action.add_argument("--cost", required=True, help="of its training: '6 minutes on one core of an AMD EPYC'")
    action.add_argument("--zoo", help="the folder of the zoo (default: that of lipjax, in a checkout)")
    action.set_defaults(act=_add)
    action = actions.add_parser("fetch", help="download a network of somebody's zoo; hashes are checked")
    action.add_argument("url", help="of its folder: https://example.org/zoo/NAME")
    action.add_argument("directory", help="where it goes; not there yet")
    action.add_argument("--sha256", help="of its zoo.json, as somebody you trust states it")
    action.set_defaults(act=lambda found: print(f"Fetched to {zoo.fetch(found.url, found.directory, found.sha256)}"))
    action = actions.add_parser("retrain", help="train a network of the zoo again, from its config and seed")
    action.add_argument("name", help="a name of `lipjax zoo list`, or the path of a network")
    action.add_argument("--workdir", required=True, help="where the run goes")
    action.add_argument("--data_dir", default="", help="where prepared data sets lie (default: as `lipjax train`)")
    action.set_defaults(act=_retrain)


def _bare(name: str) -> str:
    """A name without the "zoo/" that it has elsewhere on the command line."""
    return name.removeprefix("zoo/") if name.removeprefix("zoo/") in zoo.list() else name


def _list(found) -> None:
    for name in zoo.list(found.zoo):
        print(f"{name:<24} {zoo.directory(name, found.zoo)}")


def _add(found) -> None:
    folder = zoo.add(found.workdir, found.name, about=found.about, cost=found.cost, root=found.zoo)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Written to {folder}: {size / 1e6:.1f} MB. Prove it again: lipjax check {folder}")


def _retrain(found) -> None:
    import lipjax.training  # noqa: F401  first, because it says which packages are missing
    from lipjax.run import run
    from lipjax.training.config import load_config

    if pathlib.Path(found.workdir, "frozen").exists():
        raise UserError(f"{found.workdir} holds a certified run: give the name of another folder.")
    config, seed = load_config(zoo.directory(_bare(found.name)))
    if config.init_from:
        raise UserError(
            f"{found.name} began from the weights of another run, which the zoo does not have: train that one first, "
            "then this one by lipjax train with --config.init_from."
        )
    with config.unlocked():
        config.seeds, config.data.data_dir = (seed,), found.data_dir
    run(config, found.workdir)
