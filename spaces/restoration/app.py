# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""A web app that restores damaged pictures: `python app.py MODEL`, or a Gradio Space.

The tasks, their parameters and the checks of these are those of `ecvae restore` and of the pipeline.
"""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from huggingface_hub import metadata_load

from ecvae_diffusers import ECVAERestorationPipeline
from ecvae_diffusers.checks import MODES, height_and_width
from ecvae_diffusers.command import ArgumentParser, name_as_text, place
from ecvae_diffusers.commands import load_pipeline, read_label, run_or_fail
from ecvae_diffusers.commands.restore import REQUIRED, TASKS, WHITE_STD, check_required, measurement, uncertainty_map
from ecvae_diffusers.pipelines.pipeline_ecvae_restoration import ROUNDING_STD


FOLDER = Path(__file__).parent
HOLE = "a painted hole"
# Seconds after which pictures are deleted from the machine that the app runs on.
KEPT_FOR = 3600
# Small pictures are enlarged without being smoothed, and all of them are seen at once.
CSS = "#output img { image-rendering: pixelated; } #output .grid-wrap { min-height: 0; max-height: none; }"


def default_model() -> str:
    """Return the variable MODEL, or else the first of `models` in README.md. Raises `ValueError` if there is neither."""
    models = (metadata_load(FOLDER / "README.md") or {}).get("models") or [None]
    if not (model := os.environ.get("MODEL") or models[0]):
        raise ValueError("model must be given as an argument, as the variable MODEL, or in `models` of README.md.")
    return model


def painted(editor: dict[str, Any]) -> PIL.Image.Image:
    """Return the mask that was painted in an editor: white where any of its layers is not transparent."""
    mask = np.zeros(editor["background"].size[::-1], bool)
    for layer in editor["layers"]:
        mask |= np.asarray(layer.getchannel("A")) > 0
    return PIL.Image.fromarray(mask)


def build(pipeline: ECVAERestorationPipeline, name: str) -> Any:
    """Return the app of a pipeline, a `gradio.Blocks`. `name` is what it calls the model."""
    import gradio as gr

    config = pipeline.vae.config
    if config.in_channels not in MODES:
        raise ValueError(f"model must have images of 1, 3 or 4 channels, but {name!r} has {config.in_channels}.")
    height, width = height_and_width(config.sample_size)
    kind = "gray" if config.in_channels == 1 else "colour"
    classes = list((config.id2label or {}).values()) or list(map(str, range(config.num_class_embeds or 0)))
    served: set[str | None] = set()  # the session whose picture is being restored, if any

    # Warnings of the pipeline are shown in the page.
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: gr.Warning(record.getMessage(), duration=None)
    logging.getLogger("ecvae_diffusers").addHandler(handler)

    def restore(
        editor, task, blur_std, noise_std, answers, steps, seed, label, request: gr.Request, progress=gr.Progress()
    ):
        if not editor or not editor["background"]:
            raise gr.Error("Upload a picture first.", print_exception=False)

        def on_step(pipeline, step: int, timestep: int, tensors: dict) -> dict:
            progress((step + 1, steps), desc="Search", unit="steps")
            return {}

        served.add(request.session_hash)
        try:
            if task == HOLE:
                measured = {"image": editor["background"], "mask_image": painted(editor)}
            else:
                check_required(task, blur_std, noise_std)
                measured = measurement(editor["background"], task, blur_std)
            output = pipeline(
                **measured, noise_std=noise_std, num_restorations=answers, num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed or 0), class_labels=read_label(label or None, config),
                callback_on_step_end=on_step,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        finally:
            served.clear()
        found = [
            (image, f"residual {residual:.2g}")
            for image, residual in zip(output.images, output.residual_output.tolist())
        ]
        if output.energy is not None:  # those that are most like the training pictures come first
            order = output.energy.argsort().tolist()
            found = [(found[i][0], f"{found[i][1]}, energy {output.energy[i]:.3g}") for i in order]
        mean = f"mean, residual {output.residual_mean.item():.2g}"
        summary = [(output.mean[0], mean), (uncertainty_map(output.std[0]), "uncertainty")]
        return found, summary

    def stop(request: gr.Request) -> None:
        if request.session_hash in served:
            pipeline._interrupt = True

    with gr.Blocks(title="Restoration", analytics_enabled=False, delete_cache=(60, KEPT_FOR)) as app:
        gr.Markdown(
            f"# Restore a damaged picture\nModel: {name}, for {kind} pictures of at least {width}x{height} px. "
            "It makes of every picture what it was trained on."
        )
        with gr.Row():
            with gr.Column():
                tool = {"default_size": max(1, min(height, width) // 8)}
                editor = gr.ImageEditor(
                    type="pil", label="Damaged picture: paint over what is to be replaced", sources=("upload", "clipboard"),
                    brush=gr.Brush(colors=["#ff2d78"], color_mode="fixed", **tool), eraser=gr.Eraser(**tool),
                    transforms=(), layers=False, canvas_size=(width, height), elem_id="editor",
                )  # fmt: skip
                task = gr.Dropdown([HOLE, *TASKS], label="Damage to undo", elem_id="task")
                blur_std = gr.Number(
                    1.0, label="Standard deviation of the blur in pixels", visible=False, elem_id="blur_std"
                )
                with gr.Row():
                    answers = gr.Slider(1, 16, 4, step=1, label="Answers", elem_id="num_answers")
                    steps = gr.Slider(1, 300, 75, step=1, label="Decoder passes per answer", elem_id="steps")
                with gr.Row():
                    noise_std = gr.Number(
                        round(ROUNDING_STD, 4), label="Standard deviation of the noise",
                        info="8-bit levels divided by 127.5. At first that of rounding to 8 bits.",
                    )  # fmt: skip
                    seed = gr.Number(0, label="Seed", precision=0, info="The same seed gives the same answers.")
                label = gr.Dropdown(
                    ["", *classes], label="Class that the picture shows", visible=bool(classes), elem_id="label"
                )
                with gr.Row():
                    start = gr.Button("Restore", variant="primary", elem_id="restore")
                    end = gr.Button("Stop, and show what is found", elem_id="stop")
            with gr.Column(elem_id="output"):
                shown = {
                    "columns": 2, "format": "png", "object_fit": "contain", "interactive": False,
                    "buttons": ["download", "download_all", "fullscreen"],
                }  # fmt: skip
                found = gr.Gallery(label="Answers", elem_id="answers", **shown)
                summary = gr.Gallery(label="Mean and uncertainty", elem_id="summary", **shown)
                gr.Markdown(
                    "The residual is the relative distance to what is left of the picture. Answers of low energy, which come first, are "
                    "most like the training pictures. The uncertainty is the standard "
                    f"deviation per pixel, for images in [0, 1]: black is 0, white {WHITE_STD} or more."
                )
        task.change(lambda task: gr.Number(visible=REQUIRED.get(task) == "blur_std"), task, blur_std)
        inputs = [editor, task, blur_std, noise_std, answers, steps, seed, label]
        start.click(restore, inputs, [found, summary])
        end.click(stop, queue=False)
        app.unload(stop)
    return app


def run(args: argparse.Namespace) -> None:
    model = args.model or default_model()
    pipeline = load_pipeline(ECVAERestorationPipeline, "model", model, None)
    try:
        app = build(pipeline, name_as_text(model))
    except ImportError as error:
        raise ImportError(f"{error}: pip install -r {FOLDER / 'requirements.txt'}") from error
    app.launch(css=CSS)


def main(argv: list[str] | None = None) -> None:
    """Run the app with the arguments of this process, or with `argv`."""
    parser = ArgumentParser(description=str(__doc__).split(":")[0] + ".")
    parser.add_argument(
        "model", type=place, nargs="?", help="Pipeline: folder or Hub id. Default: the variable MODEL, or else `models` of README.md."
    )  # fmt: skip
    run_or_fail(run, parser.parse_args(argv), "app.py")


if __name__ == "__main__":
    main()
