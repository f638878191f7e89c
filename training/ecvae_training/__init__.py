"""Names that modules had before they became part of `ecvae_diffusers`, for scripts that were written with them. They go with 0.2."""

import importlib
import sys


MOVED = {
    "argument_checks": "training.arguments.checks",
    "arguments": "training.arguments.common",
    "checkpoints": "training.run.checkpoints",
    "curves": "report.curves",
    "data": "training.data.images",
    "decoder_arguments": "training.arguments.decoder",
    "decoders": "training.tasks.decoders",
    "digits": "training.data.digits",
    "ecvae_arguments": "training.arguments.vae",
    "evaluation": "evaluation.while_training",
    "evaluation_data": "evaluation.pictures",
    "evaluation_parts": "evaluation.parts",
    "evaluation_reading": "evaluation.reading",
    "evaluation_summary": "evaluation.summary",
    "evaluation_work": "evaluation.work",
    "feeds": "training.data.loaders",
    "flow_arguments": "training.arguments.flow",
    "guard": "training.run.guard",
    "images": "training.data.transforms",
    "last_line": "training.run.last_line",
    "launch": "training.run.launch",
    "lock": "training.run.lock",
    "models": "training.tasks.networks",
    "noise": "training.randomness",
    "observation": "training.run.observation",
    "optimization": "training.optimization",
    "output": "training.run.folder",
    "picture_files": "training.data.files",
    "places": "training.run.places",
    "posterior_step": "training.tasks.posterior",
    "progress": "training.run.progress",
    "recovery": "training.run.recovery",
    "report_charts": "report.charts",
    "report_page": "report.page",
    "report_verdict": "report.verdict",
    "restoration_tasks": "evaluation.restoration",
    "session": "training.run.session",
    "signals": "training.run.signals",
    "stopwatch": "training.run.stopwatch",
    "streaming": "training.data.streaming",
    "task": "training.tasks.base",
    "trainer": "training.trainer",
}

for name, place in MOVED.items():
    module = importlib.import_module(f"ecvae_diffusers.{place}")
    sys.modules[f"{__name__}.{name}"] = module
    globals()[name] = module
