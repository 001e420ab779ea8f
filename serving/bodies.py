"""What requests carry: bodies with their bounds, and the two forms that a prompt comes in."""

import base64
import binascii
import json
import secrets
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from serving.painter import MAX_TEXT
from serving.protocol import MAX_SEED, Problem


class StepBody(BaseModel):
    """A step to take."""

    model_config = ConfigDict(extra="forbid")
    n: int = Field(ge=0, le=2**31, description="the step to take: the session's newest step + 1")
    action: int = Field(ge=0, le=255)


class ForkBody(BaseModel):
    """A fork to make."""

    model_config = ConfigDict(extra="forbid")
    step: int | None = Field(None, ge=0, le=2**31, description="the last step that is shared; the newest by default")
    n: int = Field(1, ge=1, le=1000, description="how many forks")


class RolloutBody(BaseModel):
    """Futures to compute: N rows of T actions, each from the same step."""

    model_config = ConfigDict(extra="forbid")
    session: str = Field(max_length=64)
    step: int | None = Field(None, ge=0, le=2**31, description="the step they start from; the newest by default")
    actions: list[Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=1, max_length=4096)]] = Field(
        min_length=1, max_length=4096
    )
    frames: Literal["all", "last"] = "all"


def read_seed(value: object) -> int:
    """A seed as it was sent, or a random one.

    Raises:
        Problem: 422 for what is no seed.
    """
    if value in (None, ""):
        return secrets.randbelow(2**32)
    try:
        seed = int(str(value))
    except ValueError:
        seed = -1
    if not 0 <= seed <= MAX_SEED:
        raise Problem(422, "bad-seed", f"seed {str(value)[:40]!r}: give a whole number from 0 to {MAX_SEED}")
    return seed


async def read_create(request: Request) -> tuple[dict[str, Any], list[bytes]]:
    """Fields and pictures of a create request, from multipart or JSON.

    Raises:
        Problem: 415 another type, 422 broken.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind == "multipart/form-data":
        async with request.form(max_files=64, max_fields=16) as form:
            pictures = [await v.read() for _, v in form.multi_items() if isinstance(v, UploadFile)]
            return {k: v for k, v in form.multi_items() if isinstance(v, str)}, pictures
    if kind != "application/json":
        raise Problem(415, "bad-body", f"content-type {kind[:80]!r}: send multipart/form-data or application/json")
    try:
        fields = json.loads(await request.body())
        given = fields.get("picture") or []
        pictures = [base64.b64decode(p, validate=True) for p in ([given] if isinstance(given, str) else given)]
    except (ValueError, AttributeError, TypeError, RecursionError, binascii.Error) as error:
        raise Problem(
            422, "bad-body", "send a JSON object whose 'picture' is base64, or a list of base64 strings"
        ) from error
    return fields, pictures


_FIELDS: dict[str, Any] = {
    "gallery": {"type": "string", "description": "id of one of the world's pictures"},
    "text": {"type": "string", "maxLength": MAX_TEXT, "description": "words, where the server takes them"},
    "title": {
        "type": "string",
        "maxLength": MAX_TEXT,
        "description": "what the world is told about itself, where it was trained with titles",
    },
    "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED},
    "model": {"type": "string", "description": "NAME, NAME@v1, NAME@candidate; the default world when left out"},
}
_ONE_OF = [{"required": [name]} for name in ("picture", "gallery", "text")]
_ENCODED = {"type": "string", "contentEncoding": "base64"}
CREATE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "anyOf": _ONE_OF,
                    "properties": {
                        "picture": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        **_FIELDS,
                    },
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "anyOf": _ONE_OF,
                    "properties": {
                        "picture": {
                            "anyOf": [_ENCODED, {"type": "array", "items": _ENCODED}],
                            "description": "a PNG, JPEG or WebP picture, or several frames",
                        },
                        **_FIELDS,
                    },
                }
            },
        },
    }
}
"""The create request in the OpenAPI document; it is read by hand, since it comes in two forms."""

REFUSED: dict[str, Any] = {
    "description": "A refusal: problem details (RFC 9457) that name the limit it ran into.",
    "content": {
        "application/problem+json": {
            "schema": {
                "type": "object",
                "required": ["type", "title", "status", "detail"],
                "properties": {
                    "type": {"type": "string", "description": "urn:lampworks:problem:<kind>"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string", "description": "what is wrong, and what to do"},
                    "retry_after_s": {"type": "number"},
                },
            }
        }
    },
}
"""Every refusal in the OpenAPI document."""
