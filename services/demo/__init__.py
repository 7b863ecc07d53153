"""The demo fleet: three small base models trained on text found wherever Specfleet is installed."""
