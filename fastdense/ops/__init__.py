"""The block and what stands round it as ``torch.library`` operators, and what may enter them."""
