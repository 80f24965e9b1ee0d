"""Training the networks around the language model, one module each."""
