"""Training the language model: its task, step, loss, batches and model folders."""
