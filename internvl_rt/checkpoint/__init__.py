"""What lies in a checkpoint folder: its configuration, and its tensors, which are checked before they are read."""
