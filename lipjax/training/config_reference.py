"""The meaning of every field of a config, read from the comments of `config.default_config`: --help and docs/config.md.

Run: python -m lipjax.training.config_reference > docs/config.md
"""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
from typing import Any

from lipjax.models import MODELS
from lipjax.training import config as source
from lipjax.training.choices import CHOICES, Choice, model_fields


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of the default config, or a group of fields.

    Attributes: name: with its groups, such as "optimizer.eps". default: as the source writes it; "" of a group.
      comment: what it is. note: of a field, what is said about it and those after it in its group; else ""; of
      `own_fields`, which names bring it.
    """

    name: str
    default: str
    comment: str
    note: str


@functools.cache
def fields() -> tuple[Field, ...]:
    """All fields and groups, in the order of `default_config`.

    A comment behind a field is about it; one above it as well, unless there is one behind it, too: then the one above
    is about the field and those that follow.
    """
    text = textwrap.dedent(inspect.getsource(source.default_config))
    comments = {
        token.start[0]: (token.string.lstrip("# ").rstrip(), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    found = []
    for statement in function.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Attribute):
            continue
        name = ast.unparse(statement.targets[0]).removeprefix("config.")
        behind, alone = comments.get(statement.end_lineno or 0, ("", False))
        above, line = [], statement.lineno - 1
        while comments.get(line, ("", False))[1]:
            above.insert(0, comments[line][0])
            line -= 1
        is_group = ast.unparse(statement.value) == "ml_collections.ConfigDict()"
        default = "" if is_group else ast.get_source_segment(text, statement.value) or ""
        if default.startswith("config_dict.placeholder"):
            default = "None"
        behind = "" if alone else behind
        note = " ".join(above) if behind else ""
        found.append(Field(name, " ".join(default.split()), behind or " ".join(above), note))
    return tuple(found)


@functools.cache
def own_fields(choice: Choice) -> tuple[Field, ...]:
    """The fields that the names of a choice bring, each once; for one that several bring alike, all of them."""
    settings = dict.fromkeys(
        (field, setting) for name in choice.names for field, setting in choice.brings(name).items()
    )
    found = []
    for field, setting in settings:
        names = [name for name in choice.names if choice.brings(name).get(field) is setting]
        found.append(Field(f"{choice.group}.{field}", repr(setting.default), setting.comment, ", ".join(names)))
    return tuple(found)


def _model_text(name: str) -> str:
    return inspect.getdoc(MODELS[name]) or ""


def as_text(config: Any = None) -> str:
    """All fields for a terminal. config: whose values are shown; None: the defaults."""
    lines = []
    for field in fields():
        about = [textwrap.fill(t, 110, initial_indent=" " * 6, subsequent_indent=" " * 6) for t in [field.comment] if t]
        if field.note:
            lines.append(textwrap.fill(field.note, 114, initial_indent="  ", subsequent_indent="  "))
        if not field.default:
            lines += ["", f"  config.{field.name}", *about]
            continue
        value = field.default
        if config is not None:
            if field.name.startswith("model.") and field.name != "model.name":
                continue  # below, since each model has its own
            owner: Any = config
            for part in field.name.split("."):
                owner = owner[part]
            value = repr(owner)
        lines += [f"  --config.{field.name}={value}", *about]
        for choice in CHOICES[1:]:
            if field.name == choice.path:
                lines += _own_text(choice, config)
        if config is not None and field.name == "model.name":
            model = {n: v for n, v in config.model.items() if n != "name"}
            lines += [f"  --config.model.{attribute}={given!r}" for attribute, given in model.items()]
    for choice in CHOICES[1:]:
        lines += ["", f"  What --config.{choice.path} may be, and the fields that it brings with their defaults:"]
        for name in choice.names:
            given = " ".join(f"{field}={setting.default!r}" for field, setting in choice.brings(name).items())
            lines.append(f"      {name}: {given or 'none'}")
    lines += ["", "  Models, and the attributes of config.model with their own defaults:"]
    for name in MODELS:
        given = " ".join(f"{attribute}={setting.default!r}" for attribute, setting in model_fields(name).items())
        lines += ["", f"  {name}: {given}", textwrap.indent(_model_text(name), " " * 6)]
    return "\n".join(line.rstrip() for line in lines)


def _own_text(choice: Choice, config: Any) -> list[str]:
    """The fields that the choice of a config brings (None: of the default), with their values there."""
    config = source.default_config() if config is None else config
    group, lines = config[choice.group], []
    for field, setting in choice.brings(group[choice.field]).items():
        lines += [f"  --config.{choice.group}.{field}={group[field]!r}", f"      {setting.comment}"]
    return lines


def _own_table(choice: Choice) -> list[str]:
    own = own_fields(choice)
    without = ", ".join(f"`{name}`" for name in choice.names if not choice.brings(name))
    page = ["", f"Fields that are there for some values of `config.{choice.path}` alone, which bring them:"]
    page += ["", f"| field | default | what it is | {choice.path} |", "|---|---|---|---|"]
    page += [f"| `{field.name}` | `{field.default}` | {field.comment} | {field.note} |" for field in own]
    return page + (["", f"Without fields of their own: {without}."] if without else [])


def as_markdown() -> str:
    """The page docs/config.md."""
    page = [
        "# Fields of a config",
        "",
        "This page lets you look up every field of a config, its default and what it does. It is written by",
        "`python -m lipjax.training.config_reference > docs/config.md` from the comments of",
        "`lipjax/training/config.py`; `lipjax train --config=NAME --help` shows the same with the values of a config.",
        "A field is set by a config file, or by a flag: `--config.optimizer.learning_rate=0.01`. Radii are l2 in",
        "[0, 1]-pixel units. `config.loss` and `config.optimizer` have the fields of the loss, the optimizer and the",
        "schedule that are chosen: `--config.loss.name=crm` brings those of CRM, and so does, in a config file,",
        '`default_config(loss="crm")`. What both choices have keeps its value.',
    ]
    table = ["", "| field | default | what it is |", "|---|---|---|"]
    page += ["", "## config", *table]
    group = ""
    for field in (*fields(), None):
        if field is None or not field.default:
            for choice in CHOICES[1:]:
                page += _own_table(choice) if choice.group == group else []
        if field is None:
            break
        comment = field.comment.replace("|", r"\|")
        if not field.default:
            group = field.name
            page += ["", f"## config.{field.name}"]
            page += ["", comment] if comment else []
            page += table
            continue
        page += [f"| | | *{field.note}* |"] if field.note else []
        page.append(f"| `{field.name}` | `{field.default}` | {comment} |")
    page += [
        "",
        "## Models",
        "",
        "`config.model.name` says which. The flag `--config.model.name=convnet` alone takes that model with the",
        "defaults below; `input_mean`, `input_std` and `logit_scale` stay those of the config. In a config file it is",
        '`default_config(model="convnet")`.',
    ]
    for name in MODELS:
        given = ", ".join(f"`{attribute}={setting.default!r}`" for attribute, setting in model_fields(name).items())
        page += ["", f"### {name}", "", given, "", "```text", _model_text(name), "```"]
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
