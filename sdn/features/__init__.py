"""Networks that see images, for the evaluation."""
