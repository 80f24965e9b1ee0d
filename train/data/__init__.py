"""Records and recordings: read, prepared, stored and grouped for training."""
