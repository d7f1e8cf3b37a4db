"""Linen modules that know nothing of training: patches, transformer, encoder, predictor, heads."""
