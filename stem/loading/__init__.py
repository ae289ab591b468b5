"""How a model is put together: from one file, with LoRAs, another VAE and new words."""
