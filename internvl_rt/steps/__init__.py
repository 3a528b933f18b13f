"""One step on the device: which tokens it computes, where their keys and values lie, and which tokens are drawn."""
