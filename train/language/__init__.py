"""Training the language model: its task, step, loss, rows and model folders."""
