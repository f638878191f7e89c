from .detection import AnomalyOutput
from .editing import DirectionOutput
from .modular_blocks_ecvae import ECVAEAutoBlocks, ECVAEBlocks, ECVAERestorationBlocks
from .pipeline_ecflow import ECFlowPipeline
from .pipeline_ecvae import ECVAEPipeline
from .pipeline_ecvae_restoration import ECVAERestorationOutput, ECVAERestorationPipeline
