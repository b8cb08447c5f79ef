"""What every training shares: sampling rows, batches and label masks, optimizers, and the state to resume from."""
