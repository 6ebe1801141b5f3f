"""The HTTP contract: what a request may say, and what is answered."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from fastapi import Response
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from facm_core.errors import InvalidInputError, require
from facm_platform.serving.config import LimitsConfig
from facm_platform.serving.model import Description, Drawn, Order

Pixels = np.ndarray[Any, Any]
Format = Literal["png", "npy", "json"]
NPY = "application/x-npy"
# Larger integers do not survive every reader and writer of JSON.
MAX_SEED = 2**53 - 1


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 9.0 is the integer 9."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Not a default that a request may give: null is no class and no prompt.
_LEFT_AWAY: Any = None
# After the bounds, which the schema would not tell otherwise.
WHOLE = BeforeValidator(_whole)


class Request(Protocol):
    """What `request_model` makes."""

    label: int | None
    prompt: str | None
    steps: int | None
    seed: int | None
    count: int
    format: Format


class Body(BaseModel):
    """Numbers are numbers: no strings, no fractions, no names that mean nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)


def request_model(limits: LimitsConfig) -> type[Body]:
    """The request's schema, with the limits of this service in it.

    Class or prompt: what the version that draws takes, only its replica knows. See `of_version`.
    """
    text = Field(min_length=1, max_length=limits.prompt, pattern=r"\S")

    class GenerateRequest(Body):
        """One or more images of a class or a prompt."""

        label: Annotated[int, Field(ge=0), WHOLE] = Field(
            default=_LEFT_AWAY, alias="class", description="Class to draw."
        )
        prompt: Annotated[str, text] = Field(
            default=_LEFT_AWAY,
            description="What to draw. The text encoder reads its beginning, if it is long.",
        )
        steps: Annotated[int, Field(ge=1, le=limits.steps), WHOLE] | None = Field(
            default=None,
            description="Evaluations of the network; by default the fewest that the model is for.",
        )
        seed: Annotated[int, Field(ge=0, le=MAX_SEED), WHOLE] | None = Field(
            default=None,
            description="Image k is drawn with seed + k, and is the same whenever it is. "
            "By default one is drawn, and told in X-Seed.",
        )
        count: Annotated[int, Field(ge=1, le=limits.count), WHOLE] = Field(
            default=1, description="Images."
        )
        format: Format = Field(
            default="png",
            description="png: the image itself, or JSON with several in base64. "
            "npy: a uint8 array (count, height, width, channels) in NumPy's format. "
            "json: the same as nested lists.",
        )

    return GenerateRequest


def of_version(schema: dict[str, Any], described: Description) -> dict[str, Any]:
    """The OpenAPI schema with what the version in service takes, which another one may change."""
    request = schema["components"]["schemas"]["GenerateRequest"]
    taken, other = ("class", "prompt") if described.num_classes else ("prompt", "class")
    properties = dict(request["properties"])
    del properties[other]
    properties[taken] = {k: v for k, v in properties[taken].items() if k != "default"}
    if described.num_classes:
        properties[taken]["maximum"] = described.num_classes - 1
    changed = {**request, "properties": properties, "required": [taken]}
    schemas = {**schema["components"]["schemas"], "GenerateRequest": changed}
    return {**schema, "components": {**schema["components"], "schemas": schemas}}


class Images(BaseModel):
    """What every answer in JSON tells."""

    model: str
    version: str
    steps: int
    seeds: list[int]


class PngImages(Images):
    """Images in base64."""

    png: list[str]


class ArrayImages(Images):
    """Images as nested lists: rows of columns of channels, 0 to 255."""

    images: list[list[list[list[int]]]]


class Problem(BaseModel):
    """Why a request was not served."""

    detail: str


class ServedModel(BaseModel):
    """The version in service, and what may be asked of it."""

    model: str
    version: str
    sha256: str
    takes: Literal["class", "prompt"]
    classes: int | None = Field(description="Of a model that takes a class.")
    max_prompt: int | None = Field(description="Characters; of a model that takes a prompt.")
    image_shape: list[int] = Field(description="Channels, height, width.")
    recommended_steps: list[int]
    max_steps: int
    max_count: int


class Health(BaseModel):
    """Whether requests are served."""

    status: str
    version: str | None = None


def encode_png(pixels: Pixels) -> bytes:
    """PNG of uint8 (H, W, C): grey for one channel, RGB for three, with transparency one more.

    Raises:
        InvalidInputError: another number of channels.
    """
    channels = pixels.shape[-1]
    remedy = "Use npy or json"
    require(channels in (1, 2, 3, 4), "format", "png", f"no PNG has {channels} channels", remedy)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encode(model: str, order: Order, drawn: Drawn, format: Format) -> Response:
    """The answer to a request that was served.

    Raises:
        InvalidInputError: images that the format cannot hold.
    """
    headers = {
        "X-Model-Name": model,
        "X-Model-Version": drawn.version,
        "X-Model-SHA256": drawn.sha256,
        "X-Seed": str(order.seed),
        "X-Steps": str(drawn.steps),
        "Cache-Control": "no-store",
    }
    if format == "npy":
        buffer = io.BytesIO()
        np.save(buffer, drawn.images, allow_pickle=False)
        return Response(buffer.getvalue(), media_type=NPY, headers=headers)
    told = {
        "model": model,
        "version": drawn.version,
        "steps": drawn.steps,
        "seeds": list(order.seeds),
    }
    if format == "json":
        return JSONResponse(told | {"images": drawn.images.tolist()}, headers=headers)
    pictures = [encode_png(pixels) for pixels in drawn.images]
    if len(pictures) == 1:
        return Response(pictures[0], media_type="image/png", headers=headers)
    encoded = [base64.b64encode(picture).decode() for picture in pictures]
    return JSONResponse(told | {"png": encoded}, headers=headers)


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error, as every one is told."""
    # What a client sent may stand in it, and lone surrogates cannot be encoded.
    readable = detail.encode("utf-8", "backslashreplace").decode()
    return JSONResponse({"detail": readable}, status_code=status, headers=headers)


def findings(errors: Sequence[Any]) -> list[str]:
    """What pydantic finds, without the input: it may be long, or nothing that JSON can hold."""
    told = []
    for error in errors:
        place = ".".join(str(part) for part in error["loc"] if part != "body")
        text = str(error["msg"]).removeprefix("Value error, ")
        if error["type"] == "json_invalid":
            text, place = f"not JSON, at character {place}", ""
        told.append(f"{place}: {text}" if place else text)
    return told


def explain(error: InvalidInputError) -> str:
    """For a client, who has no configuration."""
    return f"{error.field}: {error.problem}. {error.remedy}."
