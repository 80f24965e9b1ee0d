"""The web page at `/`: to talk with the model from a browser."""
