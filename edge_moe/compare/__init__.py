"""Many ways to shrink one model to the same bytes, side by side."""
