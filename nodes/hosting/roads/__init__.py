"""The ways to a model's text attention: U-Net, transformer, by shape, past the host's options, under torch.compile."""
