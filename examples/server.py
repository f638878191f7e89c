#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Serve a model that `ecvae export` wrote, without torch: `python examples/server.py my_onnx_model`.

`GET /sample?seed=0` returns a picture as PNG, `GET /sample?seed=0&class_label=cat` one of a class. Requests that arrive during a
decoder pass share the next one. A picture depends only on its seed and class.
"""

import argparse
import asyncio
import io
from dataclasses import dataclass

import numpy as np
import PIL.Image
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from ecvae_diffusers.onnx import OnnxECVAEPipeline


MAX_BATCH = 32


@dataclass(eq=False)
class Draw:
    latents: np.ndarray
    labels: list[int] | None
    png: bytes | None = None


def decode(pipe: OnnxECVAEPipeline, batch: list[Draw]) -> None:
    labels = [number for one in batch for number in one.labels or []]
    for one, image in zip(batch, pipe.decode(np.concatenate([one.latents for one in batch]), labels or None)):
        PIL.Image.fromarray(image.squeeze()).save(file := io.BytesIO(), "PNG")
        one.png = file.getvalue()


def build(pipe: OnnxECVAEPipeline) -> FastAPI:
    app, waiting, decoding = FastAPI(title="EC-VAE"), list[Draw](), asyncio.Lock()

    @app.get("/sample", response_class=Response)
    async def sample(seed: int = Query(ge=0, lt=2**63), class_label: str | None = None) -> Response:
        generator = np.random.default_rng(seed)
        latents = generator.standard_normal((1, *pipe.latent_shape), np.float32)
        try:
            label = int(class_label) if class_label and class_label.isdecimal() else class_label
            draw = Draw(latents, pipe.draw_labels(label, 1, generator))
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        waiting.append(draw)
        try:
            async with decoding:
                if draw.png is None:  # no earlier pass included it
                    batch = [one for one in waiting if one.png is None]
                    await asyncio.to_thread(decode, pipe, batch[:MAX_BATCH])
        finally:
            waiting.remove(draw)
        return Response(draw.png, media_type="image/png")

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()[0]
        return JSONResponse({"detail": f"`{found['loc'][-1]}`: {found['msg']}, but is {found['input']!r}."}, 422)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split(":")[0] + ".")
    parser.add_argument("model", help="Folder that `ecvae export` wrote.")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free port. Default: 8000.")
    args = parser.parse_args()
    uvicorn.run(build(OnnxECVAEPipeline(args.model)), port=args.port)


if __name__ == "__main__":
    main()
