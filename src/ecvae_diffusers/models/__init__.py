from .autoencoder_ec import AutoencoderEC, AutoencoderECOutput
from .energy_model import EnergyModel, EnergyModelOutput
from .flow_ec import FlowEC, FlowECOutput
from .flow_images import as_shown, bits_per_dimension, dequantize
