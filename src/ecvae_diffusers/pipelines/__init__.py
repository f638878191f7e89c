from .pipeline_ecvae import ECVAEPipeline
