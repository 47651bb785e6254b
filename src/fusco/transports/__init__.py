"""Messages between ranks over torch.distributed."""
