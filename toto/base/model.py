"""The base of the models for toto's input files: frozen, with validation errors in plain words.

It reads no files: `toto.base.yaml_file` reads YAML with line numbers, and `toto.infra_repo.settings` reads TOML.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

Location: TypeAlias = tuple[str | int, ...]

_WANTED: Final = {
    "string_type": "should be text",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be yes or no",
    "tuple_type": "should be a list",
    "model_type": "should be a mapping of fields",
    "path_type": "should be a path",
}
_BOUNDS: Final = {
    "greater_than_equal": "at least",
    "greater_than": "more than",
    "less_than_equal": "at most",
    "less_than": "less than",
}


class Model(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=False)


class Fields(Model):
    """A model of what a person writes into a file: a field with nothing after its colon counts as left out."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_the_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


def shown(value: object, limit: int = 60) -> str:
    """`value` as it stands in a message: one line of about `limit` characters at most, quoted when it is text."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case int():
            text = str(value) if value.bit_length() < 200 else "a number beyond all bounds"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case str():
            text = repr(value if len(value) <= limit else value[:limit] + "…")
        case _:
            text = str(value)
    return text if len(text) <= limit + 4 else text[:limit] + "…"


def explain(error: ValidationError, model: type[BaseModel]) -> Iterator[tuple[Location, str]]:
    """Each error of a validation: its place in `model`, and one line about what is wrong there."""
    for each in error.errors(include_url=False):
        location: Location = each["loc"]
        yield location, " ".join(_words(each["type"], each, location, model).split())


def _words(kind: str, error: Any, location: Location, model: type[BaseModel]) -> str:
    value, context = error["input"], error.get("ctx", {})
    match kind:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return f"is not a known field; {_known(str(location[-1]), model, location[:-1])}"
        case "value_error":
            return str(context["error"])
        case "literal_error":
            wanted = f"should be {context['expected']}"
        case "string_type" if isinstance(value, bool | int | float):
            return f"should be text, not {shown(value)}: put it in quotes"
        case _ if kind in _BOUNDS:
            wanted = f"should be {_BOUNDS[kind]} {next(iter(context.values())):.15g}"
        case _:
            said = str(error["msg"])
            wanted = _WANTED.get(kind, said[:1].lower() + said[1:])
    return f"{wanted}, not {shown(value)}"


def _known(name: str, model: type[BaseModel], parents: Location) -> str:
    inside: Any = model
    for parent in parents:
        if get_origin(inside) is dict:  # models by name
            inside = get_args(inside)[1]
        elif (field := model.model_fields.get(str(parent))) is not None:
            inside = field.annotation
        if isinstance(inside, type) and issubclass(inside, BaseModel):
            model = inside
    if close := difflib.get_close_matches(name[:60], model.model_fields, n=1):
        return f"did you mean '{close[0]}'?"
    return f"known are {', '.join(model.model_fields)}"
