"""The parts of the OpenAPI description that FastAPI cannot know, because the routes read requests themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.answers import MEDIA_TYPES, PreviewEvent, Restoration
from serve.jobs_protocol import JobRequest
from serve.problems import ProblemDetails
from serve.protocol import RestorationOptions
from serve.uploads import FORM_TYPE, IMAGE_FIELD, RAW_TYPES

REF = "#/components/schemas/{model}"
BINARY = {"type": "string", "format": "binary"}
BOX = {
    "type": "string",
    "pattern": r"^-?[0-9]{1,6}(\.[0-9]{1,4})?,-?[0-9]{1,6}(\.[0-9]{1,4})?(,0*[1-9][0-9]{0,5}(\.[0-9]{1,4})?){2}$",
    "examples": ["120,80,64,64"],
}
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
EXTRA_MODELS: tuple[type[BaseModel], ...] = (ProblemDetails, JobRequest, Restoration, PreviewEvent)


def option_schemas() -> dict[str, dict[str, Any]]:
    """The schema of each option as it is written in a query string or a form."""
    schemas = {}
    for name, schema in RestorationOptions.model_json_schema()["properties"].items():
        variants = [variant for variant in schema.pop("anyOf", []) if variant.get("type") != "null"]
        schemas[name] = {**(variants[0] if variants else {}), **schema}
        schemas[name].pop("title", None)
        if schemas[name].get("default", 0) is None:
            del schemas[name]["default"]
    boxes = schemas["boxes"]
    schemas["boxes"] = {"type": "array", "items": BOX, "maxItems": 64, "description": boxes["description"]}
    return schemas


def upload_operation(*, options: bool) -> dict[str, Any]:
    """Query parameters and body of a route that takes an image."""
    schemas = option_schemas() if options else {}
    parameters = [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": schema["description"]}
        for name, schema in schemas.items()
    ]
    form = {
        "type": "object",
        "properties": {IMAGE_FIELD: BINARY, **schemas},
        "required": [IMAGE_FIELD],
        "additionalProperties": False,
    }
    content: dict[str, Any] = {media: {"schema": BINARY} for media in RAW_TYPES}
    content[FORM_TYPE] = {"schema": form, "encoding": {"boxes": {"explode": True}} if options else {}}
    return {"parameters": parameters, "requestBody": {"required": True, "content": content}}


def restored_response() -> dict[str, Any]:
    """The answer with a restored image."""
    headers = {
        "X-Seed": ("of the noise", "integer"),
        "X-Weights-Digest": ("of the model's weights", "string"),
        "X-Faces": ("faces found in the photo", "integer"),
        "Server-Timing": ("milliseconds by stage", "string"),
    }
    return {
        "description": "The image, or, with `Accept: application/json`, JSON that has it in base64",
        "content": {
            **{media: {"schema": BINARY} for media in MEDIA_TYPES.values()},
            "application/json": {"schema": {"$ref": REF.format(model="Restoration")}},
        },
        "headers": {
            name: {"description": description, "schema": {"type": kind}}
            for name, (description, kind) in headers.items()
        },
    }


def event_response() -> dict[str, Any]:
    """The answer with server-sent events."""
    event = {
        "type": "object",
        "properties": {
            "event": {"type": "string", "enum": ["preview", "result", "error"]},
            "data": {"type": "string", "contentMediaType": "application/json"},
        },
        "required": ["event", "data"],
    }
    return {
        "description": (
            "`event: preview` with a PreviewEvent, any number; then `event: result` with a Restoration, or "
            "`event: error` with ProblemDetails. A line that starts with a colon keeps the connection alive."
        ),
        "content": {"text/event-stream": {"schema": event}},
    }


def job_id_parameter() -> dict[str, Any]:
    """The parameter of routes about one job."""
    schema = {"type": "string", "maxLength": 128}
    return {"parameters": [{"name": "id", "in": "path", "required": True, "schema": schema}]}


def job_request_body() -> dict[str, Any]:
    """The body that starts a job."""
    schema = {"$ref": REF.format(model="JobRequest")}
    example = {"input": "s3://archive/scans", "output": "s3://archive/restored", "faces": "all"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


def describe(app: FastAPI, needs_key: Callable[[str], bool]) -> None:
    """Let an application describe itself with all of this.

    Args:
        app: whose routes are complete.
        needs_key: by path.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            components = described.setdefault("components", {})
            _, models = models_json_schema(
                [(model, "validation" if model is JobRequest else "serialization") for model in EXTRA_MODELS],
                ref_template=REF,
            )
            components.setdefault("schemas", {}).update(models["$defs"])
            components["securitySchemes"] = SCHEMES
            for path, operations in described["paths"].items():
                for operation in operations.values():
                    if needs_key(path):
                        operation["security"] = [{name: []} for name in SCHEMES]
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it
