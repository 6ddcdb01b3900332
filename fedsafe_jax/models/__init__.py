"""Models as pure functions of pytrees: decoders, encoders, LoRA, losses; nothing of federation."""
