"""Validators for rendered objects: Kubernetes' own kinds and KubeRay's.

KubeRay's come from the files in $KUBERAY_CRDS, which are not part of this repository.
"""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.helm.chart import Manifest

KUBERNETES_VERSION = "1.33"
CRD_FOLDER = "KUBERAY_CRDS"
# Of operators whose schemas we do not have: what a test says of these is written down by hand.
WITHOUT_SCHEMA = {"ServiceMonitor", "Certificate"}


class Invalid(Exception):
    """The message names the field."""


def validate(manifest: Manifest) -> None:
    """Raises `Invalid`. Skips the test where a schema of KubeRay's is needed and not there."""
    # Most objects of most renders are the same ones.
    _validate(json.dumps(manifest, sort_keys=True))


@cache
def _validate(text: str) -> None:
    manifest: Manifest = json.loads(text)
    if manifest["apiVersion"].startswith("ray.io/"):
        _validate_kuberay(manifest)
    elif manifest["kind"] not in WITHOUT_SCHEMA:
        _validate_native(manifest)


def _validate_native(manifest: Manifest) -> None:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = ".".join(str(part) for part in error.path)
        raise Invalid(f"{manifest['kind']}: {path}: {error.message}") from None
    except kubernetes_validate.SchemaNotFoundError as error:
        raise Invalid(error.message) from None


def _validate_kuberay(manifest: Manifest) -> None:
    validator = kuberay_validator(manifest["kind"].lower())
    complete = _with_defaults(manifest, validator.schema)
    error = next(iter(validator.iter_errors(complete)), None)
    if error is not None:
        raise Invalid(f"{manifest['kind']}: {error.json_path}: {error.message[:300]}")


@cache
def kuberay_validator(kind: str) -> Any:
    folder = os.environ.get(CRD_FOLDER)
    if not folder:
        pytest.skip(f"${CRD_FOLDER} names no folder with KubeRay's CRDs: they are not checked")
    text = (Path(folder) / f"ray.io_{kind}s.yaml").read_text()
    definition = yaml.load(text, Loader=yaml.CSafeLoader)
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
    schema = _closed(version["schema"]["openAPIV3Schema"])
    # A definition says of the metadata only that it is an object.
    schema["properties"]["metadata"]["required"] = ["name"]
    return jsonschema.Draft202012Validator(schema)


def _closed(schema: Any) -> Any:
    """An API server drops fields that it does not know; here they are errors."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        closed["properties"] = {key: _closed(each) for key, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    return closed


def _with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """As an API server completes an object before it looks at it."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        others = schema.get("additionalProperties")
        complete = {
            key: _with_defaults(each, known.get(key, others if isinstance(others, dict) else {}))
            for key, each in value.items()
        }
        return dict(_defaults(known, value)) | complete
    if isinstance(value, list):
        return [_with_defaults(each, schema.get("items", {})) for each in value]
    return value


def _defaults(known: dict[str, Any], given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, schema in known.items():
        if key not in given and "default" in schema:
            yield key, schema["default"]
