"""Old names of modules that are now part of `ecvae_diffusers`, for scripts that import them. They will be removed in version 0.2."""

import importlib
import sys
import types


MOVED = {
    "argument_checks": "training.config training.options",
    "arguments": "training.command_line",
    "checkpoints": "training.run.checkpoints",
    "curves": "report.curves",
    "data": "training.data.images",
    "decoder_arguments": "training.calibrate_decoder training.config training.options training.tasks.decoder_config",
    "decoders": "training.tasks.autoencoders",
    "digits": "training.data.digits",
    "ecvae_arguments": "training.train_ecvae training.config training.options training.tasks.vae_config",
    "evaluation": "evaluation.while_training",
    "evaluation_data": "evaluation.pictures",
    "evaluation_parts": "evaluation.work",
    "evaluation_reading": "evaluation.evaluate",
    "evaluation_summary": "evaluation.summary",
    "evaluation_work": "evaluation.work",
    "feeds": "training.data.loaders",
    "flow_arguments": "training.train_flow training.config training.options training.tasks.flow_config",
    "guard": "training.run.divergence",
    "images": "training.data.transforms",
    "last_line": "command",
    "launch": "training.run.launch command",
    "lock": "training.run.folder",
    "models": "training.tasks.networks",
    "noise": "training.randomness",
    "observation": "training.run.pictures training.run.log",
    "optimization": "training.tasks.networks",
    "output": "training.run.folder training.run.checkpoints training.run.log training.run.pictures",
    "picture_files": "training.data.files",
    "places": "command",
    "posterior_step": "training.tasks.posterior",
    "progress": "training.run.log",
    "recovery": "training.run.divergence",
    "report_charts": "report.charts",
    "report_page": "report.drawing",
    "report_verdict": "report.verdict",
    "restoration_tasks": "evaluation.restoration",
    "session": "training.run.launch",
    "signals": "training.run.launch",
    "stopwatch": "training.run.log",
    "streaming": "training.data.loaders",
    "task": "training.tasks.base",
    "trainer": "training.trainer",
}

for name, today in MOVED.items():
    modules = [importlib.import_module(f"ecvae_diffusers.{place}") for place in today.split()]
    module = modules[0]
    if len(modules) > 1:
        # One old module is now several.
        module = types.ModuleType(name)
        for part in modules:
            vars(module).update({key: value for key, value in vars(part).items() if not key.startswith("__")})
    sys.modules[f"{__name__}.{name}"] = module
    globals()[name] = module
