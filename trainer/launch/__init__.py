"""Launch runs with several processes under torchrun or Ray Train. `trainer.training` does the training."""
