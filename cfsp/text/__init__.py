"""Text as tokens: documents, windows, calibration, and text that a model writes itself."""
