"""Every rate of the project, per second: samples, mel frames and codes."""

# What the model hears.
SAMPLE_RATE = 16_000  # Hz
MEL_RATE = 100  # log-mel frames

# What it speaks.
CODE_RATE = 25  # audio codes
SPEECH_SAMPLE_RATE = 24_000  # Hz
SPEECH_MEL_RATE = 50  # mel frames of the flow and the vocoder
