"""Images from a source to uint8 batches on the host, and their augmentation on the device."""
