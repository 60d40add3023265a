"""What the Hub demands of a model card's metadata, as its documentation says: see `metadata_errors`."""

import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.pipelines import get_supported_tasks

#: Of the Hub's list of licences those that a MultiMax model is likely to have.
LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "openrail", "other", "unknown")


def metadata_errors(data: Any) -> list[str]:
    """A sentence for everything that the Hub would refuse in the metadata of a model card."""
    return ["metadata must be a mapping"] if not isinstance(data, dict) else list(_errors(data))


def _errors(data: dict[str, Any]) -> Iterator[str]:
    if data.get("license", LICENSES[0]) not in LICENSES:
        yield f'"license" must be one of {LICENSES}'
    if data.get("pipeline_tag", "translation") not in {*get_supported_tasks(), "translation"}:
        yield '"pipeline_tag" is no task'
    for code in _list(data, "language"):
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", str(code)):
            yield f'"language" {code!r} is no ISO 639 code'
    for field in ("tags", "metrics"):
        if not all(isinstance(entry, str) and entry for entry in _list(data, field)):
            yield f'"{field}" must be strings'
    for field in ("base_model", "datasets"):
        for name in _list(data, field):
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                yield f'"{field}": {error}'
    for index, model in enumerate(data.get("model-index", [])):
        for number, result in enumerate(model.get("results", [])):
            where = f'"model-index[{index}].results[{number}]'
            needed = {"task": ["type"], "dataset": ["type", "name"]}
            parts = [(part, result.get(part, {}), names) for part, names in needed.items()]
            parts += [(f"metrics[{i}]", m, ["type", "value"]) for i, m in enumerate(result.get("metrics", []))]
            yield from (f'{where}.{p}.{n}" is required' for p, values, names in parts for n in names if n not in values)
            if not result.get("metrics"):
                yield f'{where}.metrics" is required'
        if not model.get("name"):
            yield f'"model-index[{index}].name" is required'


def _list(data: dict[str, Any], field: str) -> list[Any]:
    value = data.get(field, [])
    return value if isinstance(value, list) else [value]
