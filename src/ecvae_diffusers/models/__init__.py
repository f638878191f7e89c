from .autoencoder_ec import AutoencoderEC, AutoencoderECOutput
from .energy_model import EnergyModel, EnergyModelOutput
