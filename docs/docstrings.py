"""Extension of griffe: docstrings as Markdown, help texts of fields, names that are imported when asked for."""

import ast
import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|func|meth|mod):(?=`)")
_LITERAL = re.compile(r"::\n(?=\n +)")
#: "    a, b: text", with the lines that go on with it.
_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", flags=re.MULTILINE)


def as_markdown(text: str) -> str:
    """``text`` without Sphinx's roles and literal marks; what several arguments share is said of each."""
    text = _LITERAL.sub(":\n", _ROLE.sub("", text))
    return _SHARED.sub(lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in m[2].split(", ")), text)


def field_of(value: str) -> tuple[str, str] | None:
    """Default and help text of ``_option(default, help)`` or ``field(default=..., metadata={"help": ...})``."""
    call = ast.parse(value, mode="eval").body
    if not isinstance(call, ast.Call):
        return None
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if ast.unparse(call.func) == "_option":
        default, text = call.args
    elif ast.unparse(call.func) == "field" and {"default", "metadata"} <= keywords.keys():
        default = keywords["default"]
        text = next(v for k, v in zip(keywords["metadata"].keys, keywords["metadata"].values) if k.value == "help")
    else:
        return None
    return ("{}" if ast.unparse(default) == "dict" else ast.unparse(default)), ast.literal_eval(text)


def functions_of(module: griffe.Module) -> Iterator[griffe.Function]:
    """The functions of a module and of those in it."""
    for member in module.members.values():
        if not member.is_alias and member.is_module:
            yield from functions_of(member)
        elif not member.is_alias and member.is_function:
            yield member


def spell_out(function: griffe.Function, package: griffe.Module) -> None:
    """Replace ``**options: Unpack[Options]`` by the keywords that the TypedDict has."""
    for parameter in list(function.parameters):
        found = re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation or ""))
        if found is None:
            continue
        del function.parameters[parameter.name]
        options = package.modules_collection[function.resolve(found[1])]
        for name, attribute in options.attributes.items():
            kind = griffe.ParameterKind.keyword_only
            function.parameters.add(griffe.Parameter(name, annotation=attribute.annotation, kind=kind, default="..."))


class Docstrings(griffe.Extension):
    """Applies :func:`as_markdown` to everything, spells out the keywords of a TypedDict, and reads the table ``_LAZY``
    (name -> module) of a package.
    """

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        if attr.value is not None and attr.parent.is_class and (found := field_of(str(attr.value))):
            attr.value, text = found
            attr.docstring = griffe.Docstring(text, parent=attr)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for function in functions_of(pkg):
            spell_out(function, pkg)
        if "_LAZY" in pkg.members:
            for name, module in ast.literal_eval(str(pkg.members["_LAZY"].value)).items():
                pkg.set_member(name, griffe.Alias(name, f"{pkg.path}.{module}.{name}"))
